//! The other side goes, politely or by kill -9, and comes back: the link follows, traffic flows again, no buffer is lost.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{LIMIT, Place, alone, frame_of, held, until};
use usernic::{Burst, Port, Queue};

/// Says to a copy of this test program which port to open.
const CHILD: &str = "USERNIC_TEST_CHILD";

fn make(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1455) as usize)
}

/// Sends numbered frames and looks at those that come: in order, each as it was made, none twice.
struct Talk {
    next: u64,
    seen: Option<u64>,
    count: u64,
    out: Burst,
    got: Burst,
}

impl Talk {
    fn new() -> Self {
        Talk {
            next: 0,
            seen: None,
            count: 0,
            out: Burst::new(32),
            got: Burst::new(32),
        }
    }

    fn send(&mut self, queue: &mut Queue) {
        while self.out.room() > 0 {
            let Some(mut packet) = queue.packet() else { break };
            packet.copy_from(&make(self.next)).unwrap();
            self.next += 1;
            assert!(self.out.push(packet).is_ok());
        }
        queue.tx(&mut self.out);
    }

    fn receive(&mut self, queue: &mut Queue) {
        queue.rx(&mut self.got);
        for packet in self.got.iter() {
            let number = u64::from_le_bytes(packet.header().expect("a frame of at least 8 bytes"));
            assert!(
                self.seen.is_none_or(|seen| seen < number),
                "frame {number} after {:?}",
                self.seen
            );
            let mut bytes = vec![0; packet.len()];
            packet.copy_to(&mut bytes);
            assert!(bytes == make(number), "bytes of frame {number}");
            self.seen = Some(number);
            self.count += 1;
        }
        self.got.clear();
    }

    fn clear(&mut self) {
        self.out.clear();
        self.got.clear();
    }
}

/// Buffers that a front-end's queue can have, with nothing under way: all but those in the receive ring.
fn spare(queue: &mut Queue) -> usize {
    queue.reclaim();
    let mut all = Burst::new(4096);
    while queue.alloc(&mut all, 256) > 0 {}
    let n = all.len();
    all.clear();
    queue.reclaim();
    n
}

/// Waits until the transmit ring is empty, then counts.
fn spare_when_quiet(front: &Port, queue: &mut Queue) -> usize {
    assert!(front.link().up);
    assert!(queue.drain(LIMIT));
    spare(queue)
}

/// The back-end port is dropped and reopened while the front-end sends.
fn back_end_returns(front: &str, back: &str, times: usize) {
    let place = Place::new();
    // Who listens must be there first.
    let listens = front.contains("server=1");
    let early = (!listens).then(|| place.open("vhost", back).unwrap());
    let front = place.open("virtio-user", front).unwrap();
    let mut port = Some(early.unwrap_or_else(|| place.open("vhost", back).unwrap()));
    let mut a = front.queue(0).unwrap();
    let (mut talk, mut spares, mut open) = (Talk::new(), None, None);
    for time in 0..times {
        let back = port.take().unwrap_or_else(|| place.open("vhost", back).unwrap());
        assert!(
            front.wait_link(LIMIT) && back.wait_link(LIMIT),
            "restart {time}: the link stays down"
        );
        let mut b = back.queue(0).unwrap();
        if spares.is_none() {
            spares = Some(spare_when_quiet(&front, &mut a));
            // A thread takes its name itself, some time after it was started.
            until("both ports' threads have their names", || held().1 == 2);
            open = Some(held());
        }
        let goal = talk.count + 200;
        until("frames arrive", || {
            for _ in 0..8 {
                talk.send(&mut a);
                talk.receive(&mut b);
            }
            talk.count >= goal
        });
        talk.send(&mut a);
        // The queue first every other time.
        if time % 2 == 0 {
            drop(b);
            drop(back);
        } else {
            drop(back);
            drop(b);
        }
        until("the front-end's link goes down", || {
            talk.send(&mut a);
            !front.link().up
        });
        talk.clear();
    }
    let back = place.open("vhost", back).unwrap();
    assert!(front.wait_link(LIMIT) && back.wait_link(LIMIT));
    let mut b = back.queue(0).unwrap();
    talk.receive(&mut b);
    assert_eq!(
        Some(spare_when_quiet(&front, &mut a)),
        spares,
        "buffers are gone after {times} restarts"
    );
    assert_eq!(front.stats().anomalies, 0);
    until("as many descriptors and threads as at the first time", || {
        Some(held()) == open
    });
}

#[test]
fn the_back_end_returns() {
    let _alone = alone();
    back_end_returns("queue_size=64,buffers=512", "", 100);
    back_end_returns("queue_size=64,buffers=512,event_idx=1,in_order=0,mrg_rxbuf=1", "", 20);
}

#[test]
fn the_back_end_returns_to_a_listening_front_end() {
    let _alone = alone();
    back_end_returns("server=1,queue_size=64,buffers=512", "client=1", 50);
}

/// The front-end port is dropped and reopened while the back-end sends and receives.
fn front_end_returns(front: &str, back: &str, times: usize) {
    let place = Place::new();
    let back = place.open("vhost", back).unwrap();
    let mut b = back.queue(0).unwrap();
    let (mut up, mut down) = (Talk::new(), Talk::new());
    let mut open = None;
    for time in 0..times {
        let port = place.open("virtio-user", front).unwrap();
        assert!(
            port.wait_link(LIMIT) && back.wait_link(LIMIT),
            "restart {time}: the link stays down"
        );
        let mut a = port.queue(0).unwrap();
        until("both ports' threads have their names", || held().1 == 2);
        open.get_or_insert_with(held);
        let goal = (up.count + 200, down.count + 200);
        until("frames arrive", || {
            for _ in 0..8 {
                up.send(&mut a);
                up.receive(&mut b);
                down.send(&mut b);
                down.receive(&mut a);
            }
            up.count >= goal.0 && down.count >= goal.1
        });
        up.send(&mut a);
        up.clear();
        if time % 2 == 0 {
            drop((a, port));
        } else {
            drop((port, a));
        }
        until("the back-end's link goes down", || {
            down.send(&mut b);
            !back.link().up
        });
    }
    let port = place.open("virtio-user", front).unwrap();
    assert!(port.wait_link(LIMIT) && back.wait_link(LIMIT));
    let _a = port.queue(0).unwrap();
    until("as many descriptors and threads as at the first time", || {
        Some(held()) == open
    });
    assert_eq!(back.stats().anomalies, 0);
}

#[test]
fn the_front_end_returns() {
    let _alone = alone();
    front_end_returns("queue_size=64,buffers=512", "", 50);
    front_end_returns("queue_size=64,buffers=512,event_idx=1,mrg_rxbuf=1", "", 20);
}

#[test]
fn the_front_end_returns_and_listens() {
    let _alone = alone();
    front_end_returns("server=1,queue_size=64,buffers=512", "client=1", 20);
}

/// `reconnect=0`: a lost back-end is not looked for again.
#[test]
fn no_reconnect() {
    let _alone = alone();
    let place = Place::new();
    let (front, back) = place.pair("reconnect=0", "");
    drop(back);
    until("the link goes down", || !front.link().up);
    let _back = place.open("vhost", "").unwrap();
    assert!(!front.wait_link(Duration::from_millis(200)));
}

/// In the copy: sends back what comes, until it is killed. In the tests' own process this does nothing.
#[test]
fn child() {
    let Ok(spec) = std::env::var(CHILD) else { return };
    let port = Port::open(&spec).unwrap();
    let mut queue = port.queue(0).unwrap();
    let mut burst = Burst::new(32);
    let end = Instant::now() + 6 * LIMIT;
    while Instant::now() < end {
        if queue.rx(&mut burst) == 0 && burst.is_empty() {
            queue.wait(Some(Duration::from_millis(20))).unwrap();
        }
        queue.tx(&mut burst);
    }
    panic!("the test forgot its child");
}

/// The copy of this program; killed when this is dropped.
struct Other(Child);

impl Other {
    fn start(kind: &str, socket: &Path, more: &str) -> Self {
        let comma = if more.is_empty() { "" } else { "," };
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--test-threads=1"])
            .env(CHILD, format!("{kind},path={}{comma}{more}", socket.display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Other(child)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // SIGKILL.
        self.0.kill().unwrap();
        let status = self.0.wait().unwrap();
        let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
        assert!(killed || std::thread::panicking(), "it ended by itself: {status}");
    }
}

/// The other side runs in a process that is killed in mid-traffic, again and again.
fn killed(ours: &str, our_more: &str, theirs: &str, their_more: &str, times: usize) {
    let _alone = alone();
    let place = Place::new();
    let client = ours == "virtio-user" && !our_more.contains("server=1");
    let mut other = client.then(|| Other::start(theirs, &place.socket(), their_more));
    if client {
        until("the back-end listens", || {
            std::os::unix::net::UnixStream::connect(place.socket()).is_ok()
        });
    }
    let port = place.open(ours, our_more).unwrap();
    let mut queue = port.queue(0).unwrap();
    let mut spares = None;
    for time in 0..times {
        let other = other
            .take()
            .unwrap_or_else(|| Other::start(theirs, &place.socket(), their_more));
        assert!(port.wait_link(LIMIT), "restart {time}: the link stays down");
        let mut talk = Talk::new();
        let exchange = |talk: &mut Talk, queue: &mut Queue, goal: u64| {
            until("frames come back", || {
                for _ in 0..8 {
                    talk.send(queue);
                    talk.receive(queue);
                }
                talk.count >= goal
            })
        };
        exchange(&mut talk, &mut queue, 500);
        if ours == "virtio-user" && spares.is_none() {
            talk.clear();
            until("the echo is quiet", || {
                let before = talk.count;
                std::thread::sleep(Duration::from_millis(20));
                while queue.rx(&mut talk.got) > 0 {
                    talk.count += talk.got.len() as u64;
                    talk.got.clear();
                }
                talk.count == before
            });
            spares = Some(spare_when_quiet(&port, &mut queue));
            // The numbers go on: on a busy machine an echo may be later than quiet was.
            let next = talk.next;
            talk = Talk { next, ..Talk::new() };
            exchange(&mut talk, &mut queue, 500);
        }
        talk.send(&mut queue);
        drop(other);
        until("the link goes down", || {
            talk.send(&mut queue);
            talk.receive(&mut queue);
            !port.link().up
        });
        // What had come before is still there for whoever looks; the rest is given back.
        talk.clear();
    }
    let last = Other::start(theirs, &place.socket(), their_more);
    assert!(port.wait_link(LIMIT));
    if let Some(spares) = spares {
        let mut got = Burst::new(32);
        until("no buffer is lost", || {
            queue.rx(&mut got);
            got.clear();
            spare_when_quiet(&port, &mut queue) == spares
        });
    }
    assert_eq!(port.stats().anomalies, 0, "{:?}", port.stats());
    drop(last);
}

const SMALL: &str = "queue_size=64,buffers=512";

#[test]
fn the_back_end_is_killed() {
    killed("virtio-user", SMALL, "vhost", "", 10);
}

#[test]
fn the_back_end_of_a_listening_front_end_is_killed() {
    killed("virtio-user", &format!("server=1,{SMALL}"), "vhost", "client=1", 10);
}

#[test]
fn the_front_end_is_killed() {
    killed("vhost", "", "virtio-user", SMALL, 10);
}

#[test]
fn the_listening_front_end_is_killed() {
    killed("vhost", "client=1", "virtio-user", &format!("server=1,{SMALL}"), 10);
}
