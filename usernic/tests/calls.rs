//! Random sequences of calls of ports, queues and bursts, with numbers at their ends, packets of other ports, ports that
//! are dropped under their queues, and a second thread at the ports: none panics or hangs, every packet is whole, and no
//! buffer is lost.
//!
//! USERNIC_FUZZ gives another number of sequences, USERNIC_FUZZ_SEED another beginning.

mod common;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Place, Random, until};
use usernic::filter::Filter;
use usernic::{Burst, Port, Queue};

/// The ends of what a number can be, and small ones.
fn number(random: &mut Random) -> u64 {
    let end = [0, 1 << 8, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63][random.below(7) as usize];
    match random.below(3) {
        0 => random.below(5),
        1 => random.below(3000),
        _ => u64::wrapping_add(end, random.below(5)).wrapping_sub(2),
    }
}

/// Times that are over soon, and those that no clock can add where the call returns at once.
fn short(random: &mut Random) -> Duration {
    [Duration::ZERO, Duration::from_nanos(1), Duration::from_micros(300)][random.below(3) as usize]
}

struct World {
    random: Random,
    ports: Vec<Option<Port>>,
    queues: Vec<Option<Queue>>,
    bursts: Vec<Burst>,
    moved: [u64; 2],
}

impl World {
    /// A queue that is taken, if the place drawn has one; and a burst.
    fn draw(&mut self) -> (Option<&mut Queue>, &mut Burst, u64) {
        let at = self.random.below(self.queues.len() as u64) as usize;
        let burst = self.random.below(self.bursts.len() as u64) as usize;
        let number = number(&mut self.random);
        (self.queues[at].as_mut(), &mut self.bursts[burst], number)
    }

    fn step(&mut self) {
        let choice = self.random.below(24);
        let time = short(&mut self.random);
        if choice > 18 {
            return self.port_step();
        }
        let (queue, burst, number) = self.draw();
        if choice > 12 {
            return self.burst_step(choice);
        }
        let Some(queue) = queue else { return };
        let before = burst.len();
        match choice {
            0..=2 => {
                let n = queue.rx(burst);
                assert_eq!(burst.len(), before + n);
                burst[before..].iter().for_each(|packet| assert!(packet.len() >= 14));
                self.moved[0] += n as u64;
            }
            3..=5 => {
                let n = queue.tx(burst);
                // What the other side can never take leaves, too.
                assert!(burst.len() <= before - n);
                self.moved[1] += n as u64;
            }
            6 | 7 => {
                let n = queue.alloc(burst, number as usize);
                assert_eq!(burst.len(), before + n);
                // Frames that can be sent, and some that cannot.
                for (packet, len) in burst[before..].iter_mut().zip((number % 77..).step_by(19)) {
                    packet.set_len((len % 2000) as usize).unwrap();
                }
            }
            8 => queue.free(burst),
            9 => queue.reclaim(),
            10 => _ = queue.drain(time),
            11 => _ = queue.wait(Some(time)),
            _ => {
                queue.arm();
                let _ = (queue.as_fd(), queue.is_open(), queue.index(), queue.stats());
                let _ = (queue.disarm(), queue.packet());
            }
        }
    }

    fn burst_step(&mut self, choice: u64) {
        let number = number(&mut self.random);
        let other = self.random.below(self.bursts.len() as u64) as usize;
        let at = self.random.below(self.bursts.len() as u64) as usize;
        let mut burst = std::mem::replace(&mut self.bursts[at], Burst::new(1));
        let len = burst.len();
        match choice {
            13 => burst.truncate(number as usize),
            14 => assert!(burst.move_to(&mut self.bursts[other]) <= len),
            15 => burst.retain(|packet| packet.len() as u64 % 3 != number % 3),
            16 if len > 1 => {
                burst.swap(0, len - 1);
                let packet = burst.pop().unwrap();
                if let Err(packet) = self.bursts[other].push(packet) {
                    assert_eq!(self.bursts[other].room(), 0);
                    burst.push(packet).unwrap();
                }
            }
            17 if len > 0 => {
                let packet = &mut burst[number as usize % len];
                match number % 5 {
                    0 => _ = packet.set_len(number as usize),
                    1 => _ = packet.move_start(number as isize),
                    2 => _ = packet.trim_front(number as usize),
                    3 => packet.set_vlan_tag(Some(number as u16)),
                    _ => _ = (packet.request_checksum(), packet.request_segmentation(number as u16)),
                }
                let mut bytes = vec![0; packet.len()];
                assert!(
                    packet.read_at(0, &mut bytes).is_ok()
                        && packet.read_at(number as usize, &mut [0; 2]).is_ok()
                            == (number.saturating_add(2) <= bytes.len() as u64)
                );
            }
            _ if number.is_multiple_of(4) => burst.clear(),
            _ => {}
        }
        assert_eq!(burst.room(), burst.capacity() - burst.len());
        self.bursts[at] = burst;
    }

    fn port_step(&mut self) {
        let number = number(&mut self.random);
        let at = self.random.below(self.ports.len() as u64) as usize;
        let time = short(&mut self.random);
        // Its queues report that it is gone.
        if number == 1 && self.random.below(20) == 0 {
            self.ports[at] = None;
        }
        let Some(port) = &self.ports[at] else { return };
        match self.random.below(9) {
            0 => assert_eq!(
                port.queue_stats(number as u16).is_some(),
                (number as u16) < port.queue_count()
            ),
            1 => {
                let place = self.random.below(self.queues.len() as u64) as usize;
                self.queues[place] = None;
                if let Ok(queue) = port.queue(number as u16 % 3) {
                    self.queues[place] = Some(queue);
                }
            }
            2 => _ = port.set_queues(number as u16),
            3 => _ = (port.wait_link(time), port.set_mtu(number as u16)),
            4 => _ = port.set_filter(number.is_multiple_of(2).then(|| Filter::new(port.mac()))),
            5 => _ = port.set_link_up(!number.is_multiple_of(4)),
            6 => _ = (port.announce(), port.take_announcements(), port.device_stats().is_ok()),
            7 => {
                _ = (
                    port.set_mac([number as u8; 6]),
                    port.cpu(number as u16),
                    port.steering(),
                )
            }
            _ => {
                _ = (
                    port.link(),
                    port.stats(),
                    port.memory(),
                    port.link_error(),
                    format!("{port:?}"),
                )
            }
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

#[test]
fn no_sequence_of_calls_panics_or_loses_a_buffer() {
    let sequences = setting("USERNIC_FUZZ", 40);
    let mut random = Random::new(setting("USERNIC_FUZZ_SEED", 1));
    let mut moved = [0; 2];
    for sequence in 0..sequences {
        let keys = [
            "packed_vq=0",
            "packed_vq=1,csum=1,tso=1",
            "queues=2,queue_size=64",
            "in_order=1,mtu=1200",
        ];
        let keys = keys[sequence as usize % keys.len()];
        let queues = if keys.contains("queues=2") { "queues=2" } else { "" };
        let (left, right) = (Place::new(), Place::new());
        let [(a, b), (c, d)] = [&left, &right].map(|place| place.pair(keys, queues));
        let mut world = World {
            random: Random::new(random.next()),
            ports: [a, b, c, d].map(Some).into(),
            queues: (0..6).map(|_| None).collect(),
            bursts: [1, 2, 32, 64, 300].map(Burst::new).into(),
            moved: [0; 2],
        };
        for at in 0..4 {
            world.queues[at] = world.ports[at].as_ref().and_then(|port| port.queue(0).ok());
        }
        (0..2000).for_each(|_| world.step());
        moved = [moved[0] + world.moved[0], moved[1] + world.moved[1]];
        // What the ports that are left have sent and not delivered is all that their buffers can be in.
        world.bursts.clear();
        world.queues.clear();
        for port in world.ports.iter().flatten() {
            let mut queue = port.queue(0).unwrap();
            let mut all = Burst::new(1);
            queue.reclaim();
            until("a buffer comes home", || queue.alloc(&mut all, 1) > 0);
        }
    }
    assert!(moved.iter().all(|&n| n > 100 * sequences), "{moved:?}");
}

/// Ports may be asked and told from any thread while others drive their queues.
#[test]
fn ports_are_told_things_while_their_queues_run() {
    let place = Place::new();
    let (front, back) = place.pair("queues=2,queue_size=64", "queues=2");
    let mut queues = [front.queue(0).unwrap(), back.queue(0).unwrap()];
    let stop = AtomicBool::new(false);
    /// The threads are to end, whatever fails.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for port in [&front, &back] {
            scope.spawn(|| {
                let mut random = Random::new(7);
                while !stop.load(Ordering::Relaxed) {
                    let number = number(&mut random);
                    let _ = match random.below(5) {
                        0 => port.set_queues(number as u16),
                        1 => port.set_filter(number.is_multiple_of(2).then(|| Filter::new(port.mac()))),
                        2 => port.set_link_up(true),
                        3 => port.announce(),
                        _ => port.set_mtu(number as u16),
                    };
                    // A queue that another thread has is not given out a second time.
                    assert!(port.queue(0).is_err());
                }
            });
        }
        let mut burst = Burst::new(32);
        for turn in 0..20_000 {
            let [a, b] = &mut queues;
            let (from, to) = if turn % 2 == 0 { (a, b) } else { (b, a) };
            from.alloc(&mut burst, 4);
            burst.iter_mut().for_each(|packet| packet.set_len(60).unwrap());
            from.tx(&mut burst);
            from.free(&mut burst);
            to.rx(&mut burst);
            burst.iter().for_each(|packet| assert_eq!(packet.len(), 60));
            to.free(&mut burst);
        }
    });
}
