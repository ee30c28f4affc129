//! A process that has no descriptor left for a connection: a listening port waits without spinning, and recovers by itself.
//! Alone in its file: the limit is the whole process's.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{LIMIT, Place, until};
use raw::{Raw, Setup, event, memfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Seconds of CPU time of this process.
fn spent() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[test]
fn a_port_waits_for_descriptors_without_spinning() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let (file, kick, call) = (memfd(0x10_0000), event(), event());
    let before = getrlimit(Resource::Nofile);
    let few = Rlimit {
        current: Some(64),
        maximum: before.maximum,
    };
    for _ in 0..2 {
        let client = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        setrlimit(Resource::Nofile, few).unwrap();
        let fill: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        connect(&client, &SocketAddrUnix::new(place.socket()).unwrap()).unwrap();
        let begin = spent();
        std::thread::sleep(Duration::from_secs(1));
        let spent = spent() - begin;
        assert!(spent < 0.5, "{spent} s of CPU time in a second");
        drop(fill);
        setrlimit(Resource::Nofile, before).unwrap();

        let raw = Raw::new(UnixStream::from(client));
        assert!(raw.set_up(&Setup::default(), file.as_fd(), kick.as_fd(), call.as_fd()));
        assert!(back.wait_link(LIMIT), "it does not recover");
        drop(raw);
        until("the link goes down", || !back.link().up);
    }
}
