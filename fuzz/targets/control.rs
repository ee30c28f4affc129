//! Commands of the control queue, and the configuration space.
#![no_main]

mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use usernic::filter::Filter;
use usernic::offload::hash::Indirection;
use virtio_ring::Features;
use virtio_ring::net::{Config, Header, Request};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let features = Features::from_bits_retain(input.u64());
    let config = Config::parse(input.bytes(Config::LEN));
    assert_eq!(Config::parse(&config.to_bytes()), config);
    let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
    while !input.is_empty() {
        let len = usize::from(input.u8()) * 4 % 400;
        let bytes = input.bytes(len);
        if let Some(header) = Header::parse(bytes) {
            let mut again = bytes.to_vec();
            assert!(header.emit(&mut again));
        }
        let Ok(request) = Request::parse(bytes, features, &config) else {
            continue;
        };
        filter.apply(&request);
        if let Request::Rss(rss) = request {
            assert!(rss.table().all(|pair| pair < config.max_virtqueue_pairs));
            assert!(rss.key().len() <= usize::from(config.rss_max_key_size));
            if let Some(table) = Indirection::new(rss.table(), rss.unclassified) {
                let report = virtio_ring::net::HashReport::IPV4;
                assert!(table.pair(u32::from(bytes[0]) * 0x0101_0101, report) < config.max_virtqueue_pairs);
            }
        }
        filter.accepts(bytes);
    }
});
