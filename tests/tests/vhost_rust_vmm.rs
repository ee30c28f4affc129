//! Our front-end port against rust-vmm's `vhost-user-backend`: a network back-end on their trait, their rings, their
//! protocol code, that sends every frame back. Frames of 60 to 9,000 bytes, compared byte for byte and in order.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use usernic::{Burst, Port};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Bytes of the header before each frame with VERSION_1 (virtio 1.3, 5.1.6).
const HEADER: usize = 12;
const MRG_RXBUF: u64 = 1 << 15;
const LIMIT: Duration = Duration::from_secs(10);

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A receive buffer of the front-end: its chain's head, its parts, their length.
struct Place {
    head: u16,
    parts: Vec<(GuestAddress, usize)>,
    len: usize,
}

/// A back-end that sends back what it gets.
struct Echo {
    memory: Memory,
    features: u64,
    acked: u64,
    event_idx: bool,
    frames: VecDeque<Vec<u8>>,
    places: VecDeque<Place>,
    echoed: u64,
}

impl Echo {
    fn new(features: u64) -> Self {
        Echo {
            memory: Memory::new(GuestMemoryMmap::new()),
            features: features | 1 << 32 | 1 << 30,
            acked: 0,
            event_idx: false,
            frames: VecDeque::new(),
            places: VecDeque::new(),
            echoed: 0,
        }
    }

    /// Takes all frames of the transmit ring.
    fn take(&mut self, ring: &mut VringState<Memory>, memory: &GuestMemoryLoadGuard<GuestMemoryMmap>) {
        while let Some(chain) = ring.get_queue_mut().pop_descriptor_chain(memory.clone()) {
            let head = chain.head_index();
            let mut bytes = Vec::new();
            for descriptor in chain {
                assert!(!descriptor.is_write_only(), "a writable descriptor in a transmit ring");
                let at = bytes.len();
                bytes.resize(at + descriptor.len() as usize, 0);
                memory.read_slice(&mut bytes[at..], descriptor.addr()).unwrap();
            }
            assert!(
                bytes.len() > HEADER && bytes[..HEADER] == [0; HEADER],
                "a header without offloads is zeroes"
            );
            self.frames.push_back(bytes.split_off(HEADER));
            ring.add_used(head, 0).unwrap();
        }
    }

    /// Puts frames into the receive ring, as many as there are buffers for.
    fn give(&mut self, ring: &mut VringState<Memory>, memory: &GuestMemoryLoadGuard<GuestMemoryMmap>) {
        while let Some(frame) = self.frames.front() {
            let need = HEADER + frame.len();
            let mergeable = self.acked & MRG_RXBUF != 0;
            while self.places.iter().map(|place| place.len).sum::<usize>() < need {
                let Some(chain) = ring.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                    return;
                };
                let head = chain.head_index();
                let parts: Vec<_> = chain.map(|d| (d.addr(), d.len() as usize)).collect();
                let len = parts.iter().map(|part| part.1).sum();
                self.places.push_back(Place { head, parts, len });
                assert!(
                    mergeable || self.places.len() == 1,
                    "a frame of {need} bytes in a buffer of {len}"
                );
            }
            // Exactly as many as it takes: all that were gathered for it.
            let mut bytes = vec![0; HEADER];
            bytes[10..].copy_from_slice(&(self.places.len() as u16).to_le_bytes());
            bytes.extend(self.frames.pop_front().unwrap());
            let mut rest = &bytes[..];
            for place in self.places.drain(..) {
                let mut written = 0;
                for (addr, len) in place.parts {
                    let (now, later) = rest.split_at(len.min(rest.len()));
                    memory.write_slice(now, addr).unwrap();
                    written += now.len();
                    rest = later;
                }
                ring.add_used(place.head, written as u32).unwrap();
            }
            assert!(rest.is_empty());
            self.echoed += 1;
        }
    }
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        32768
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn acked_features(&mut self, features: u64) {
        self.acked = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Memory) -> std::io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap())
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[Self::Vring],
        _thread: usize,
    ) -> std::io::Result<()> {
        let memory = self.memory.memory();
        let (rx, tx) = (&vrings[0], &vrings[1]);
        loop {
            for ring in [rx, tx] {
                ring.disable_notification().unwrap();
            }
            self.take(&mut tx.get_mut(), &memory);
            self.give(&mut rx.get_mut(), &memory);
            for ring in [rx, tx] {
                if ring.needs_notification().unwrap() {
                    ring.signal_used_queue().unwrap();
                }
            }
            // Both, whatever the first says; what came in the meantime is to be seen.
            let more = [rx, tx].map(|ring| ring.enable_notification().unwrap());
            // More receive buffers are of no use while there is no frame for them.
            if !more[1] && (!more[0] || self.frames.is_empty()) {
                return Ok(());
            }
        }
    }
}

/// The frame of a number.
fn frame(number: u64, longest: usize) -> Vec<u8> {
    let len = match number % 5 {
        0 => 60,
        1 => 1514,
        2 => longest,
        _ => 60 + (number as usize * 7919) % (longest - 59),
    };
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend((8..len).map(|i| ((number as usize * 31) ^ (i * 7) ^ (i >> 8)) as u8));
    bytes
}

/// Sends `count` frames through a back-end of these features and compares what comes back.
fn echo(features: u64, spec: &str, count: u64, longest: usize, sleeps: bool) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("echo.sock");
    let backend = Arc::new(Mutex::new(Echo::new(features)));
    let memory = Memory::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("echo".into(), Arc::clone(&backend), memory).unwrap();
    let served = std::thread::spawn({
        let socket = socket.clone();
        move || daemon.serve(socket)
    });
    let end = Instant::now() + LIMIT;
    let spec_at = format!("virtio-user,path={},{spec}", socket.display());
    // Its socket is there before anybody listens on it: bind(2), then listen(2).
    let port = loop {
        match Port::open(&spec_at) {
            Ok(port) => break port,
            Err(usernic::Error::VhostUser(
                usernic::vhost_user::Error::NoSocket { .. } | usernic::vhost_user::Error::NobodyListens { .. },
            )) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{spec}: {error}"),
        }
    };
    assert!(port.link().up);
    assert_eq!(port.link().features & MRG_RXBUF, features & MRG_RXBUF);
    let mut queue = port.queue(0).unwrap();
    let (mut out, mut got) = (Burst::new(32), Burst::new(32));
    let (mut made, mut seen, mut last) = (0, 0, Instant::now());
    while seen < count {
        // No more under way than the rings hold on the way back.
        while made < count && out.room() > 0 {
            let Some(mut packet) = queue.packet() else { break };
            if packet.copy_from(&frame(made, longest)).is_err() {
                drop(packet);
                queue.reclaim();
                break;
            }
            made += 1;
            assert!(out.push(packet).is_ok());
        }
        queue.tx(&mut out);
        if queue.rx(&mut got) == 0 {
            assert!(
                last.elapsed() < LIMIT,
                "{spec}: {seen} of {count} came back; {:?}",
                queue.stats()
            );
            if sleeps {
                let begin = Instant::now();
                queue.wait(Some(Duration::from_secs(5))).unwrap();
                assert!(
                    begin.elapsed() < Duration::from_secs(5),
                    "{spec}: nobody called, frame {seen}"
                );
            } else {
                std::thread::yield_now();
            }
            continue;
        }
        last = Instant::now();
        for packet in got.iter() {
            let mut bytes = vec![0; packet.len()];
            packet.copy_to(&mut bytes);
            assert!(bytes == frame(seen, longest), "{spec}: frame {seen}");
            seen += 1;
        }
        got.clear();
    }
    let stats = port.stats();
    assert_eq!((stats.tx_packets, stats.rx_packets), (count, count), "{spec}");
    assert_eq!(
        (stats.tx_errors, stats.rx_errors, stats.anomalies),
        (0, 0, 0),
        "{spec}: {stats:?}"
    );
    drop(queue);
    drop(port);
    served.join().unwrap().unwrap();
    assert_eq!(backend.lock().unwrap().echoed, count);
}

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

#[test]
fn queue_sizes_with_mergeable_buffers() {
    for size in [16, 64, 256, 1024, 4096] {
        let spec = format!("queue_size={size},mrg_rxbuf=1,mtu=9000");
        echo(MRG_RXBUF | INDIRECT, &spec, 3_000, 9000, false);
    }
}

#[test]
fn queue_sizes_with_large_buffers() {
    for size in [16, 256, 4096] {
        let spec = format!("queue_size={size},mrg_rxbuf=0,buffer_size=9216,mtu=9000");
        echo(0, &spec, 3_000, 9000, false);
    }
}

#[test]
fn asleep() {
    for (features, spec) in [
        (MRG_RXBUF, "mrg_rxbuf=1,mtu=9000"),
        (MRG_RXBUF | EVENT_IDX | INDIRECT, "mrg_rxbuf=1,mtu=9000,event_idx=1"),
        (EVENT_IDX, "mtu=1500,event_idx=1,queue_size=16"),
    ] {
        let longest = if features & MRG_RXBUF != 0 { 9000 } else { 1514 };
        echo(features, spec, 3_000, longest, true);
    }
}
