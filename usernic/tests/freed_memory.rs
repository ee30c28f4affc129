//! The memory of a port that is closed is given back when its last packet is freed, whatever the threads do that freed some
//! of them. Alone in its file: it looks at what the process has mapped.

mod common;

use std::sync::mpsc::channel;

use common::Place;
use usernic::{Burst, Port};

/// Mappings of memory files of this process.
fn mapped() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:usernic ")).count()
}

#[test]
fn a_thread_that_freed_packets_and_sleeps_keeps_no_mapping() {
    let before = mapped();
    let place = Place::new();
    // Nobody is behind it: a back-end in this process would map its memory, too.
    let spec = format!("virtio-user,path={},memory=memfd", place.socket().display());
    let open = || Port::open_unconnected(spec.parse().unwrap()).unwrap();
    let (to_freer, packets) = channel();
    let (done, freed) = channel();
    let freer = std::thread::spawn(move || {
        // It sleeps in `recv` while ports are closed.
        for mut burst in packets {
            let burst: &mut Burst = &mut burst;
            match burst.len() {
                1 => drop(burst.pop()),
                _ => burst.clear(),
            }
            done.send(()).unwrap();
        }
    });
    for count in [1, 3, 63, 64, 65, 200] {
        let port = open();
        assert_eq!(mapped(), before + 1);
        let mut queue = port.queue(0).unwrap();
        let mut burst = Burst::new(count);
        assert_eq!(queue.alloc(&mut burst, count), count);
        to_freer.send(burst).unwrap();
        freed.recv().unwrap();
        let held = queue.packet().unwrap();
        drop((queue, port));
        assert_eq!(mapped(), before + 1, "a packet is held");
        // The last one, freed here or there.
        let mut last = Burst::new(1);
        last.push(held).unwrap();
        if count % 2 == 0 {
            to_freer.send(last).unwrap();
            freed.recv().unwrap();
        } else {
            drop(last);
        }
        assert_eq!(mapped(), before, "{count} packets were freed by a thread that sleeps");
    }
    // One that ends beside a port that closes.
    for _ in 0..50 {
        let port = open();
        let mut burst = Burst::new(4);
        port.queue(0).unwrap().alloc(&mut burst, 4);
        let (ready, is_ready) = channel();
        let ending = std::thread::spawn(move || {
            drop(burst);
            ready.send(()).unwrap();
        });
        is_ready.recv().unwrap();
        drop(port);
        ending.join().unwrap();
        assert_eq!(mapped(), before);
    }
    drop(to_freer);
    freer.join().unwrap();
}
