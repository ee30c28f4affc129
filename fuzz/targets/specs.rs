//! Port specs: what a configuration, a control request or a command line may say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use usernic::needs::Needs;
use usernic::spec::PortSpec;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(spec) = text.parse::<PortSpec>() else {
        return;
    };
    assert_eq!(spec.check(), Ok(()));
    // What is said twice is refused, whatever it is.
    if let Some((_, key)) = text.rsplit_once(',')
        && key.contains('=')
    {
        assert!(format!("{text},{key}").parse::<PortSpec>().is_err());
    }
    // All sizes come out of it, or are refused.
    let _ = Needs::of(&spec);
});
