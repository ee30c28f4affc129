//! The header is what the source says.

use std::path::Path;

/// `include/usernic.h` is current. With USERNIC_HEADER=write it is made so.
#[test]
fn the_header_is_current() {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut config = cbindgen::Config::from_file(crate_dir.join("cbindgen.toml")).expect("cbindgen.toml");
    let part = |name: &str| std::fs::read_to_string(crate_dir.join("src").join(name)).expect("a part of the header");
    config.header = Some(part("head.h").trim_end().to_owned());
    config.trailer = Some(part("tail.h").trim_end().to_owned());
    let bindings = cbindgen::Builder::new()
        .with_crate(crate_dir)
        .with_config(config)
        .generate()
        .expect("the source is read");
    let mut bytes = Vec::new();
    bindings.write(&mut bytes);
    let made = String::from_utf8(bytes).expect("UTF-8");
    let path = crate_dir.join("include/usernic.h");
    if std::env::var_os("USERNIC_HEADER").is_some_and(|v| v == "write") {
        std::fs::write(&path, &made).expect("the header can be written");
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((line, (is, should))) = there
        .lines()
        .map(Some)
        .chain(std::iter::repeat(None))
        .zip(made.lines().map(Some).chain(std::iter::repeat(None)))
        .enumerate()
        .take_while(|(_, pair)| *pair != (None, None))
        .find(|(_, (is, should))| is != should)
    {
        panic!(
            "include/usernic.h is not current at line {}: it has {is:?}, the source says {should:?}; \
             USERNIC_HEADER=write cargo test -p usernic-ffi --test header",
            line + 1
        );
    }
    // The end of the last line, too.
    assert_eq!(there, made);
}
