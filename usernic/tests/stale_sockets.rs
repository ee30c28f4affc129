//! A socket file that was left over is replaced by one of those that start at the same time, and by one only.

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Barrier;

use common::Place;
use usernic::vhost_user::{Error, Listener};

/// Starts at a time, and how often.
const STARTS: usize = 8;
const ROUNDS: usize = 200;

/// Each says whether it listens, and keeps its listener until all have said so.
fn all_at_once(path: &Path) -> usize {
    let barrier = Barrier::new(STARTS);
    let start = || {
        barrier.wait();
        let listener = Listener::bind(path);
        barrier.wait();
        match listener {
            Ok(listener) => {
                // The others looked whether somebody listens.
                while listener.accept().expect("no error").is_some() {}
                let _client = UnixStream::connect(path).expect("somebody listens");
                let accepted = listener.accept().expect("no error");
                assert!(accepted.is_some(), "another one listens at the path");
                true
            }
            Err(Error::SocketInUse { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..STARTS).map(|_| scope.spawn(start)).collect();
        let listen = threads.into_iter().map(|thread| thread.join().expect("no panic"));
        listen.filter(|listens| *listens).count()
    })
}

#[test]
fn one_of_many_starts_serves_and_the_others_say_why_not() {
    let place = Place::new();
    let path = place.socket();
    let folder = path.parent().expect("a folder");
    for round in 0..ROUNDS {
        // Left behind every other time.
        if round % 2 == 0 {
            drop(UnixListener::bind(&path).expect("a path"));
        }
        assert_eq!(all_at_once(&path), 1, "round {round}");
        assert_eq!(std::fs::read_dir(folder).expect("a folder").count(), 0, "round {round}");
    }
}

#[test]
fn a_lock_that_is_not_given_back_keeps_nobody_from_a_socket() {
    let place = Place::new();
    let path = place.socket();
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
    let lock = path.with_file_name(format!(".{name}.lock"));
    // A file that was left over by a process that was killed.
    std::fs::write(&lock, "").expect("a file");
    drop(Listener::bind(&path).expect("nobody has it"));
    assert!(!lock.exists());
    // One that somebody holds, and kinds that no lock has.
    let held = std::fs::File::create(&lock).expect("a file");
    held.lock().expect("a lock");
    drop(Listener::bind(&path).expect("it goes on without"));
    std::fs::remove_file(&lock).expect("it is there");
    std::fs::create_dir(&lock).expect("a folder");
    drop(Listener::bind(&path).expect("it goes on without"));
    std::fs::remove_dir(&lock).expect("it is there");
    std::os::unix::fs::symlink("/nonexistent", &lock).expect("a link");
    drop(Listener::bind(&path).expect("it goes on without"));
}
