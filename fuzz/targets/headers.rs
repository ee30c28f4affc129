//! Packets: where their headers are, their checksums, what they are cut into, their hash, and the filter.
#![no_main]

mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use usernic::filter::Filter;
use usernic::offload::checksum::{Partial, pseudo, set_ipv4, verify};
use usernic::offload::hash::{KEY, Toeplitz};
use usernic::offload::headers::{Headers, MAX_HEADERS};
use usernic::offload::segment::Segmenter;
use virtio_ring::net::{GsoType, HashReport, HashTypes, RxMode};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (kind, size, modes) = (input.u8(), input.u16(), input.u8());
    let longer = usize::from(input.u16()) * usize::from(modes & 1);
    let frame = input.0;
    let head = &frame[..frame.len().min(MAX_HEADERS)];
    // A frame may be longer than what is looked at of it.
    let len = frame.len() + longer;

    let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
    filter.set_mode(RxMode::Promiscuous, modes & 2 != 0);
    filter.set_mode(RxMode::AllMulticast, modes & 4 != 0);
    filter.set_vlan(size & 0xfff, modes & 8 != 0);
    filter.accepts(head);

    let partial = Partial {
        start: size,
        offset: u16::from(kind),
    };
    let mut copy = frame.to_vec();
    assert_eq!(partial.complete(&mut copy), partial.fits(frame.len()));

    let Some(headers) = Headers::parse(head, len) else {
        return;
    };
    assert!(headers.network_at <= head.len() && headers.end <= len);
    let (_, report) = Toeplitz::new(&KEY).report(&headers, head, HashTypes::from_bits_retain(u32::from(size)));
    assert!(report == HashReport::NONE || size & 0x1ff != 0);
    pseudo(&headers, head, len);
    if longer == 0 {
        verify(&headers, [frame]);
    }
    let mut copy = head.to_vec();
    set_ipv4(&headers, &mut copy);
    if let Some(partial) = Partial::open(&headers, &mut copy, len) {
        assert!(partial.fits(len));
    }
    if let Ok(mut segmenter) = Segmenter::new(head, len, GsoType(kind), size) {
        let (packets, longest, header_len) = (segmenter.packets(), segmenter.longest(), segmenter.header_len());
        let (mut count, mut at) = (0, header_len);
        while let Some(cut) = segmenter.next() {
            let payload = cut.payload();
            assert!(payload.start == at && payload.end <= len);
            // One without payload is one packet, too.
            assert!(!payload.is_empty() || packets == 1);
            assert!(cut.packet_len() == header_len + payload.len() && cut.packet_len() <= longest);
            at = payload.end;
            count += 1;
            if let Some(bytes) = frame.get(payload) {
                assert_eq!(cut.headers_with(bytes).len(), header_len);
            }
        }
        assert_eq!(count, packets);
    }
});
