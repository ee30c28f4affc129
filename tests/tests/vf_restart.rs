//! A thousand starts of a port on a virtual function, in process.

mod vf_machine;

use usernic::Queue;
use vf_machine::{Machine, frame, receive, send};

#[test]
fn a_thousand_starts_each_with_a_frame_both_ways() {
    let machine = Machine::two();
    let b = machine.port(1, ",queue_size=64");
    let mut qb = b.queue(0).unwrap();
    for round in 0..1000 {
        let a = machine.port(0, ",queue_size=64");
        let mut qa = a.queue(0).unwrap();
        let pass = |from: &mut Queue, to: &mut Queue, sent: Vec<u8>| {
            send(from, std::slice::from_ref(&sent));
            assert_eq!(receive(to, 1), [sent], "start {round}");
        };
        pass(&mut qa, &mut qb, frame(b.mac(), a.mac(), 100, round));
        pass(&mut qb, &mut qa, frame(a.mac(), b.mac(), 100, round));
        assert_eq!(a.stats().anomalies, 0);
    }
    drop((qb, b));
    machine.finish();
}
