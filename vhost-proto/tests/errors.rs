//! Each way to break the protocol has an error of its own, which names the message, and drops what came with it.

mod common;

use common::{NEED_REPLY, Open, Peer, addr, message, number, offer, reply, state, table, words};
use vhost_proto::channel::Channel;
use vhost_proto::{Command, Error, Frontend, Outcome, ProtocolFeatures, Reply, Step};

/// What a back-end that has negotiated `protocol` says to one message with `fds` descriptors.
fn after(protocol: u64, bytes: &[u8], fds: usize) -> Error {
    let open = Open::default();
    let mut peer = Peer::new(offer());
    peer.give(&number(16, 0, protocol), vec![]).unwrap();
    let error = peer.give(bytes, open.fds(fds)).expect_err("it was taken");
    assert_eq!(open.count(), 0, "{error}: a descriptor is still open");
    assert_eq!(peer.give(&message(1, 0, &[]), open.fds(1)), Err(Error::Dead));
    assert_eq!(open.count(), 0);
    error
}

fn says(error: Error, expected: Error, text: &str) {
    assert_eq!(error, expected);
    assert_eq!(error.to_string(), text);
}

#[test]
fn version() {
    let mut bytes = message(1, 0, &[]);
    bytes[4] = 2;
    says(
        after(0, &bytes, 0),
        Error::Version { flags: 2 },
        "message flags 0x2: the version is not 1",
    );
}

#[test]
fn unknown() {
    for code in [0, 45, u32::MAX] {
        assert_eq!(after(0, &message(code, 0, &[]), 1), Error::Unknown { code });
    }
    assert_eq!(Error::Unknown { code: 45 }.to_string(), "message 45 is unknown");
}

#[test]
fn oversized() {
    for size in [513, u32::MAX] {
        let mut bytes = message(25, 0, &[]);
        bytes[8..].copy_from_slice(&size.to_le_bytes());
        let name = "SET_CONFIG";
        assert_eq!(after(1 << 9, &bytes, 1), Error::Oversized { name, size });
    }
}

/// Of every message with a fixed length one byte more and one less.
#[test]
fn size() {
    use vhost_proto::message::{Request, Shape};
    for request in Request::ALL {
        let lengths = match request.shape() {
            Shape::Exact(0) => vec![1],
            Shape::Exact(n) => vec![n - 1, n + 1],
            Shape::AtLeast(0) => vec![],
            Shape::AtLeast(n) => vec![n - 1],
        };
        for size in lengths {
            let error = after(
                offer().protocol.bits(),
                &message(request.code(), 0, &vec![0; size as usize]),
                0,
            );
            assert_eq!(
                error,
                Error::Size {
                    name: request.name(),
                    size
                }
            );
        }
    }
}

/// Of every message that takes descriptors one less, and of every message one more.
#[test]
fn missing_and_surplus_fds() {
    use vhost_proto::message::{Fds, Request, Shape};
    for request in Request::ALL {
        let (Shape::Exact(size) | Shape::AtLeast(size)) = request.shape();
        let mut payload = vec![0; size as usize];
        let least = match request.fds() {
            Fds::None | Fds::AtMostOne => 0,
            Fds::One | Fds::Vring => 1,
            Fds::Table => {
                payload[0] = 3;
                payload.extend([0; 96]);
                3
            }
        };
        let most = if request.fds() == Fds::AtMostOne { 1 } else { least };
        let bytes = message(request.code(), 0, &payload);
        let name = request.name();
        if least > 0 {
            let given = least - 1;
            let needed = least;
            assert_eq!(after(0, &bytes, given), Error::MissingFd { name, given, needed });
        }
        let given = most + 1;
        assert_eq!(
            after(0, &bytes, given),
            Error::SurplusFd {
                name,
                given,
                taken: most
            }
        );
    }
    // With bit 8 there is none.
    assert_eq!(
        after(0, &number(13, 0, 0x100), 1),
        Error::SurplusFd {
            name: "SET_VRING_CALL",
            given: 1,
            taken: 0
        }
    );
    // A table that says more than any has.
    let mut many = table(0, &[[0; 4]; 8]);
    many[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        after(0, &many, 8),
        Error::MissingFd {
            name: "SET_MEM_TABLE",
            given: 8,
            needed: u32::MAX as usize
        }
    );
}

#[test]
fn stray_fd() {
    assert_eq!(
        after(0, &message(1, 0, &[]), 9),
        Error::StrayFd,
        "more than any message takes"
    );
    let open = Open::default();
    let mut peer = Peer::new(offer());
    peer.give(&table(0, &[[0; 4]])[..12], open.fds(1)).unwrap();
    assert_eq!(open.count(), 1);
    let error = peer.give(&table(0, &[[0; 4]])[12..], open.fds(1));
    assert_eq!(error, Err(Error::StrayFd), "in the middle of a message");
    assert_eq!(open.count(), 0);
}

#[test]
fn truncated() {
    let open = Open::default();
    for have in [1, 11, 12, 51] {
        let mut peer = Peer::new(offer());
        peer.give(&table(0, &[[0; 4]])[..have], open.fds(1)).unwrap();
        assert_eq!(peer.back.closed(), Err(Error::Truncated { have }));
        assert_eq!(open.count(), 0);
    }
}

#[test]
fn reply_to_nothing() {
    assert_eq!(after(0, &reply(1, &[0; 8]), 0), Error::ReplyToNothing { code: 1 });
    let mut front = Frontend::<u32>::new();
    assert_eq!(
        front.receive(&reply(1, &[0; 8])[..12], []).unwrap_err(),
        Error::ReplyToNothing { code: 1 }
    );
}

#[test]
fn not_negotiated() {
    use vhost_proto::message::{Request, Shape};
    for (code, feature) in [
        (6, "LOG_SHMFD"),
        (7, "LOG_SHMFD"),
        (17, "MQ"),
        (19, "RARP"),
        (20, "MTU"),
        (21, "BACKEND_REQ"),
        (23, "CROSS_ENDIAN"),
        (24, "CONFIG"),
        (25, "CONFIG"),
        (26, "CRYPTO_SESSION"),
        (27, "CRYPTO_SESSION"),
        (28, "PAGEFAULT"),
        (29, "PAGEFAULT"),
        (30, "PAGEFAULT"),
        (31, "INFLIGHT_SHMFD"),
        (32, "INFLIGHT_SHMFD"),
        (34, "RESET_DEVICE"),
        (35, "INBAND_NOTIFICATIONS"),
        (36, "CONFIGURE_MEM_SLOTS"),
        (37, "CONFIGURE_MEM_SLOTS"),
        (38, "CONFIGURE_MEM_SLOTS"),
        (39, "STATUS"),
        (40, "STATUS"),
        (41, "SHARED_OBJECT"),
        (42, "DEVICE_STATE"),
        (43, "DEVICE_STATE"),
        (44, "SHMEM"),
    ] {
        let request = Request::from_code(code).unwrap();
        let (Shape::Exact(size) | Shape::AtLeast(size)) = request.shape();
        let fds = usize::from(request.fds() == vhost_proto::message::Fds::One);
        let name = request.name();
        assert_eq!(
            after(0, &message(code, 0, &vec![0; size as usize]), fds),
            Error::NotNegotiated { name, feature }
        );
    }
    // The front-end refuses to send it, and lives on.
    let mut front = Frontend::<u32>::new();
    let error = front.command(Command::GetQueueNum, false).unwrap_err();
    assert_eq!(
        error,
        Error::NotNegotiated {
            name: "GET_QUEUE_NUM",
            feature: "MQ"
        }
    );
    assert!(front.command(Command::GetFeatures, false).is_ok());
}

#[test]
fn features() {
    let surplus = 1 << 33;
    assert_eq!(
        after(0, &number(2, 0, surplus | 1 << 32), 0),
        Error::Features {
            name: "SET_FEATURES",
            surplus
        }
    );
    assert_eq!(
        after(0, &number(16, 0, 1 << 63 | 1), 0),
        Error::Features {
            name: "SET_PROTOCOL_FEATURES",
            surplus: 1 << 63
        }
    );
}

#[test]
fn untimely() {
    assert_eq!(
        after(0, &number(12, 0, 0), 1),
        Error::Untimely {
            name: "SET_VRING_KICK",
            before: "SET_VRING_ADDR"
        }
    );
    let open = Open::default();
    let mut peer = Peer::new(offer());
    peer.give(&addr(0, 1, 2, 3), vec![]).unwrap();
    assert_eq!(
        peer.give(&number(12, 0, 0), open.fds(1)),
        Err(Error::Untimely {
            name: "SET_VRING_KICK",
            before: "SET_VRING_NUM"
        })
    );
    // An event that was not finished.
    let mut peer = Peer::new(offer());
    let bytes = number(2, 0, 1 << 32);
    peer.back.receive(&bytes[..12], []).unwrap();
    assert!(matches!(peer.back.receive(&bytes[12..], []), Ok(Step::Event(_))));
    assert_eq!(
        peer.give(&message(1, 0, &[]), open.fds(1)),
        Err(Error::Untimely {
            name: "a message",
            before: "SET_FEATURES"
        })
    );
    assert_eq!(open.count(), 0);
    // An outcome without an event.
    let mut peer = Peer::new(offer());
    assert!(matches!(peer.back.finish(Outcome::Done), Err(Error::Untimely { .. })));
    // A command while a reply is awaited.
    let mut front = Frontend::<u32>::new();
    front.command(Command::GetFeatures, false).unwrap();
    assert_eq!(
        front.command(Command::SetOwner, false).unwrap_err(),
        Error::Untimely {
            name: "SET_OWNER",
            before: "GET_FEATURES"
        }
    );
}

#[test]
fn ring() {
    for (code, name, fds) in [
        (8, "SET_VRING_NUM", 0),
        (10, "SET_VRING_BASE", 0),
        (11, "GET_VRING_BASE", 0),
        (18, "SET_VRING_ENABLE", 0),
    ] {
        assert_eq!(after(0, &state(code, 4, 1), fds), Error::Ring { name, index: 4 });
        assert_eq!(
            after(0, &state(code, u32::MAX, 1), fds),
            Error::Ring { name, index: u32::MAX }
        );
    }
    for (code, name) in [(13, "SET_VRING_CALL"), (14, "SET_VRING_ERR"), (12, "SET_VRING_KICK")] {
        assert_eq!(after(0, &number(code, 0, 255), 1), Error::Ring { name, index: 255 });
    }
    assert_eq!(
        after(0, &addr(4, 1, 2, 3), 0),
        Error::Ring {
            name: "SET_VRING_ADDR",
            index: 4
        }
    );
}

#[test]
fn value() {
    for num in [0, 32769, u32::MAX] {
        let (name, value) = ("SET_VRING_NUM", num.into());
        assert_eq!(after(0, &state(8, 0, num), 0), Error::Value { name, value });
    }
    assert_eq!(
        after(0, &state(18, 0, 2), 0),
        Error::Value {
            name: "SET_VRING_ENABLE",
            value: 2
        }
    );
    for value in [67, 65536, u64::MAX] {
        assert_eq!(
            after(1 << 4, &number(20, 0, value), 0),
            Error::Value {
                name: "NET_SET_MTU",
                value
            }
        );
    }
    assert_eq!(
        after(1 << 16, &number(39, 0, 256), 0),
        Error::Value {
            name: "SET_STATUS",
            value: 256
        }
    );
    let config = message(24, 0, &[0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        after(1 << 9, &config, 0),
        Error::Value {
            name: "GET_CONFIG",
            value: 257
        }
    );
}

#[test]
fn unsupported() {
    // Messages of devices that a network back-end is not.
    assert_eq!(
        after(0, &message(33, 0, &[]), 1),
        Error::Unsupported { name: "GPU_SET_SOCKET" }
    );
    assert_eq!(
        after(0, &message(22, 0, &[0; 32]), 0),
        Error::Unsupported { name: "IOTLB_MSG" }
    );
}

/// A front-end that has negotiated REPLY_ACK, STATUS, CONFIG, INFLIGHT_SHMFD and MQ.
fn front() -> Frontend<common::Fd> {
    let mut front = Frontend::new();
    let feed = |front: &mut Frontend<common::Fd>, bytes: &[u8]| {
        front.receive(&bytes[..12], []).unwrap();
        front.receive(&bytes[12..], []).unwrap().unwrap();
    };
    front.command(Command::GetFeatures, false).unwrap();
    feed(&mut front, &reply(1, &words(&[1 << 32 | 1 << 30])));
    front.command(Command::GetProtocolFeatures, false).unwrap();
    feed(&mut front, &reply(15, &words(&[u64::MAX])));
    let wanted = ProtocolFeatures::REPLY_ACK
        | ProtocolFeatures::STATUS
        | ProtocolFeatures::CONFIG
        | ProtocolFeatures::INFLIGHT_SHMFD
        | ProtocolFeatures::MQ;
    front.command(Command::SetProtocolFeatures(wanted), false).unwrap();
    front
}

/// What a front-end says to an answer.
fn answered(command: Command<'_>, bytes: &[u8], fds: usize) -> Result<Reply<common::Fd>, Error> {
    let open = Open::default();
    let mut front = front();
    front.command(command, true).unwrap();
    let (mut rest, mut fds) = (bytes, Some(open.fds(fds)));
    let result = loop {
        let (piece, later) = rest.split_at(front.wants().min(rest.len()));
        rest = later;
        match front.receive(piece, fds.take().into_iter().flatten()) {
            Ok(Some(reply)) => return Ok(reply),
            Ok(None) if rest.is_empty() => break Err(front.closed().unwrap()),
            Ok(None) => {}
            Err(error) => break Err(error),
        }
    };
    assert_eq!(open.count(), 0);
    assert_eq!(front.command(Command::GetFeatures, false).unwrap_err(), Error::Dead);
    assert_eq!(front.receive(&[0], open.fds(1)).unwrap_err(), Error::Dead);
    assert_eq!(open.count(), 0);
    result
}

#[test]
fn answers_that_are_wrong() {
    let ask = |bytes: &[u8], fds| answered(Command::GetFeatures, bytes, fds).unwrap_err();
    let name = "GET_FEATURES";
    assert_eq!(ask(&message(1, 0, &[0; 8]), 0), Error::NotAReply { name });
    assert_eq!(ask(&reply(15, &[0; 8]), 0), Error::OtherReply { name, code: 15 });
    assert_eq!(ask(&reply(1, &[0; 4]), 0), Error::Size { name, size: 4 });
    assert_eq!(ask(&reply(1, &[0; 16]), 0), Error::Size { name, size: 16 });
    assert_eq!(
        ask(&reply(1, &[0; 8]), 1),
        Error::SurplusFd {
            name,
            given: 1,
            taken: 0
        }
    );
    // Shorter than it announces: published front-ends take it.
    assert_eq!(ask(&reply(1, &[0; 8])[..16], 0), Error::Truncated { have: 16 });
    let mut bytes = reply(1, &[0; 8]);
    bytes[4] = 4;
    assert_eq!(ask(&bytes, 0), Error::Version { flags: 4 });
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[4] = 5;
    assert_eq!(ask(&bytes, 0), Error::Oversized { name, size: u32::MAX });
}

#[test]
fn refused() {
    let error = answered(Command::SetFeatures(1 << 32), &reply(2, &words(&[1])), 0).unwrap_err();
    says(
        error,
        Error::Refused {
            name: "SET_FEATURES",
            code: 1,
        },
        "the other side refused SET_FEATURES (it answered 1)",
    );
    assert!(matches!(
        answered(Command::SetFeatures(1 << 32), &reply(2, &words(&[0])), 0),
        Ok(Reply::Ack)
    ));
}

/// What a device works without may be refused: the connection is as good as before.
#[test]
fn an_advisory_command_is_refused() {
    for (command, code) in [
        (Command::NetSetMtu(9000), 20),
        (Command::SendRarp([2, 0, 0, 0, 0, 1]), 19),
        (Command::SetBackendReqFd, 21),
        (Command::SetConfig(0, &[1]), 25),
        (Command::SetVringErr(0, true), 14),
    ] {
        let mut front: Frontend<common::Fd> = Frontend::new();
        let feed = |front: &mut Frontend<common::Fd>, command: Command<'_>, bytes: &[u8]| {
            front.command(command, true).unwrap();
            front.receive(&bytes[..12], []).unwrap();
            front.receive(&bytes[12..], [])
        };
        feed(&mut front, Command::GetFeatures, &reply(1, &words(&[1 << 30]))).unwrap();
        feed(
            &mut front,
            Command::GetProtocolFeatures,
            &reply(15, &words(&[u64::MAX])),
        )
        .unwrap();
        front
            .command(Command::SetProtocolFeatures(offer().protocol), false)
            .unwrap();
        let refused = feed(&mut front, command, &reply(code, &words(&[1])));
        assert!(matches!(refused, Err(Error::Refused { code: 1, .. })), "{command:?}");
        let features = feed(&mut front, Command::GetFeatures, &reply(1, &words(&[1 << 30])));
        assert!(matches!(features, Ok(Some(Reply::Features(_)))), "{command:?}");
    }
}

#[test]
fn answers_that_do_not_fit_the_question() {
    assert_eq!(
        answered(Command::GetVringBase(1), &reply(11, &words(&[0])), 0).unwrap_err(),
        Error::Ring {
            name: "GET_VRING_BASE",
            index: 0
        }
    );
    assert_eq!(
        answered(Command::GetStatus, &reply(40, &words(&[256])), 0).unwrap_err(),
        Error::Value {
            name: "GET_STATUS",
            value: 256
        }
    );
    // A configuration of another place, or of another length than it says.
    for payload in [
        vec![1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 7],
        vec![0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7],
        vec![0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7],
        vec![0, 0, 0, 0, 2, 0, 0, 0],
    ] {
        let error = answered(Command::GetConfig(0, 2), &reply(24, &payload), 0).unwrap_err();
        assert!(
            matches!(error, Error::Value { name: "GET_CONFIG", .. } | Error::Size { .. }),
            "{error}"
        );
    }
    assert!(
        matches!(
            answered(Command::GetConfig(0, 2), &reply(24, &[]), 0),
            Ok(Reply::Config(_, 0))
        ),
        "empty: there is no such piece"
    );
    assert!(matches!(
        answered(
            Command::GetConfig(0, 2),
            &reply(24, &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 8]),
            0
        ),
        Ok(Reply::Config([7, 8, ..], 2))
    ));
}

/// The specification's inflight description has 20 bytes; peers that send a C structure send 24.
#[test]
fn inflight_with_and_without_padding() {
    for len in [20, 24] {
        let mut payload = [words(&[0x3000, 0x1000]), vec![2, 0, 0, 1, 0, 0, 0, 0]].concat();
        payload.truncate(len);
        match answered(Command::GetInflightFd(2, 256), &reply(31, &payload), 1) {
            Ok(Reply::Inflight(inflight, Some(_))) => {
                let seen = (inflight.mmap_size.get(), inflight.mmap_offset.get());
                assert_eq!(seen, (0x3000, 0x1000));
                assert_eq!((inflight.num_queues.get(), inflight.queue_size.get()), (2, 256));
            }
            other => panic!("{len} bytes: {other:?}"),
        }
        let open = Open::default();
        let mut peer = Peer::new(offer());
        peer.give(&number(16, 0, 1 << 12), vec![]).unwrap();
        peer.give(&message(31, 0, &payload), vec![]).unwrap();
        peer.give(&message(32, 0, &payload), open.fds(1)).unwrap();
        assert_eq!(peer.events(), ["get inflight 2 256", "set inflight 12288"]);
    }
}

/// What the owner of a back-end cannot do is said to a front-end that asks, in the form that the message has for it.
#[test]
fn outcomes() {
    let mut peer = Peer::new(offer());
    peer.give(&number(16, 0, 1 << 3 | 1 << 9), vec![]).unwrap();
    let bytes = number(2, NEED_REPLY, 1 << 32);
    peer.back.receive(&bytes[..12], []).unwrap();
    peer.back.receive(&bytes[12..], []).unwrap();
    let answer = peer.back.finish(Outcome::Failed).unwrap().unwrap();
    assert_eq!(answer.bytes(), reply(2, &words(&[1])));

    let bytes = message(24, 0, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    peer.back.receive(&bytes[..12], []).unwrap();
    peer.back.receive(&bytes[12..], []).unwrap();
    let answer = peer.back.finish(Outcome::Config(&[])).unwrap().unwrap();
    assert_eq!(
        answer.bytes(),
        reply(24, &[]),
        "an empty answer: there is no such piece"
    );

    let bytes = state(11, 0, 0);
    peer.back.receive(&bytes[..12], []).unwrap();
    peer.back.receive(&bytes[12..], []).unwrap();
    assert_eq!(
        peer.back.finish(Outcome::Done).unwrap_err(),
        Error::Value {
            name: "GET_VRING_BASE",
            value: 0
        },
        "a base is what was asked for"
    );
}

#[test]
fn the_channel() {
    let open = Open::default();
    let give = |bytes: &[u8], fds: usize| {
        let mut channel = Channel::new();
        let result = channel.receive(&bytes[..12], open.fds(fds)).and_then(|none| {
            if bytes.len() == 12 {
                Ok(none)
            } else {
                channel.receive(&bytes[12..], [])
            }
        });
        if result.is_err() {
            assert!(matches!(channel.receive(&[0], open.fds(1)), Err(Error::Dead)));
        }
        let text = result.map(|asked| asked.map(|(notice, pending)| (format!("{notice:?}"), pending)));
        assert_eq!(open.count(), 0);
        text
    };
    let (notice, pending) = give(&message(2, 0, &[]), 0).unwrap().unwrap();
    assert_eq!((notice.as_str(), pending), ("ConfigChange", None));
    let (notice, pending) = give(&message(4, NEED_REPLY, &words(&[3])), 0).unwrap().unwrap();
    assert_eq!(notice, "VringCall(3)");
    assert_eq!(pending.unwrap().answer(true).bytes(), reply(4, &words(&[0])));
    let (_, pending) = give(&message(8, 0, &[7; 16]), 0).unwrap().unwrap();
    assert_eq!(
        pending.unwrap().answer(false).bytes(),
        reply(8, &words(&[1])),
        "a lookup is always answered"
    );
    // Each message comes with all that is in it: payload and descriptor.
    let area = words(&[0x101, 4096, 0x1234_0000]);
    let (notice, pending) = give(&message(3, NEED_REPLY, &area), 0).unwrap().unwrap();
    assert!(
        notice.starts_with("Other(VringHostNotifierMsg, Area(VringArea { ring: U64(257), size: U64(4096)")
            && notice.contains(&format!("offset: U64({})", 0x1234_0000))
            && notice.ends_with("None)"),
        "{notice}"
    );
    assert!(pending.is_some());
    for code in [6, 7, 8] {
        let uuid: [u8; 16] = std::array::from_fn(|at| at as u8);
        let (notice, _) = give(&message(code, 0, &uuid), 0).unwrap().unwrap();
        assert!(
            notice.contains(&format!("Object(SharedObject {{ uuid: {uuid:?} }})")),
            "{notice}"
        );
    }
    let map = words(&[7, 0x1000, 0x2000, 0x3000, 1]);
    for (code, fds) in [(9, 1), (10, 0)] {
        let (notice, _) = give(&message(code, 0, &map), fds).unwrap().unwrap();
        assert!(notice.starts_with(["Other(ShmemMap", "Other(ShmemUnmap"][code as usize - 9]));
        for field in [
            "shmid: 7",
            "fd_offset: U64(4096)",
            "shm_offset: U64(8192)",
            "len: U64(12288)",
            "flags: U64(1)",
        ] {
            assert!(notice.contains(field), "{notice}: {field}");
        }
        assert_eq!(notice.contains("Some(Fd"), fds == 1);
    }

    assert_eq!(give(&message(11, 0, &[]), 1), Err(Error::Unknown { code: 11 }));
    assert_eq!(
        give(&message(9, 0, &[0; 40]), 0),
        Err(Error::MissingFd {
            name: "BACKEND_SHMEM_MAP",
            given: 0,
            needed: 1
        })
    );
    assert_eq!(
        give(&message(2, 0, &[]), 1),
        Err(Error::SurplusFd {
            name: "BACKEND_CONFIG_CHANGE_MSG",
            given: 1,
            taken: 0
        })
    );
    assert_eq!(give(&reply(2, &[]), 0), Err(Error::ReplyToNothing { code: 2 }));
}
