//! Property tests of what others send to the program: frames, configurations of the CNI plugin, requests to a control socket.
//! Capture files have such tests beside their readers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};
use usernic::vhost_user::SocketAccess;

use crate::cni::config::Config;
use crate::control::{Control, Request};
use crate::packets::*;
use crate::responder::Responder;

const ME: Mac = [2, 0, 0, 0, 0, 1];
const YOU: Mac = [2, 0, 0, 0, 0, 2];

/// A question of each kind, untagged and with two tags.
fn questions() -> Vec<Vec<u8>> {
    let (mine, yours): (Ipv6Addr, Ipv6Addr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
    let (me, you) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
    let echo = ipv4(you, me, protocol::ICMP, 5, &icmp_echo(8, 7, 9, &[0; 20]));
    let echo6 = icmpv6_echo(yours, mine, 128, 1, 2, b"hello");
    let echo6 = ipv6(yours, mine, protocol::ICMPV6, 64, &echo6);
    let request = arp(ArpOp::Request, (YOU, you), ([0; 6], me));
    let mut all = vec![
        ethernet(ME, YOU, ethertype::IPV4, &echo),
        ethernet(ME, YOU, ethertype::IPV6, &echo6),
        ethernet(BROADCAST, YOU, ethertype::ARP, &request),
        neighbour_solicitation(YOU, yours, mine),
    ];
    let tagged = |frame: &Vec<u8>| [&frame[..12], &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5], &frame[12..]].concat();
    all.extend(all.iter().map(tagged).collect::<Vec<_>>());
    all
}

/// A value of JSON.
fn value() -> impl Strategy<Value = Value> {
    let texts = [
        "",
        "a",
        "/run/x",
        "../a",
        "ovs",
        "1.1.0",
        "02:00:00:00:00:01",
        "queues=2,",
        "\0",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..5000u32).prop_map(Value::from),
        select(texts.to_vec()).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let key = select(vec!["cni", "uid", "mac", "type", "name", "ifname", "queues", "ip"]);
        let pair = (key, inner.clone()).prop_map(|(key, value)| (key.to_owned(), value));
        prop_oneof![
            vec(inner, 0..4).prop_map(Value::from),
            vec(pair, 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// What may come over a control socket: whole requests, parts of some, and other bytes.
fn sent() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        select(vec![
            "{\"op\":\"stats\"}\n",
            "{\"op\":\"list\"}\r\n",
            "{\"op\":\"add\",\"name\":\"a\",\"spec\":\"vhost,path=/s\",\"join\":{\"connect\":\"b\"}}\n",
            "{\"op\":\"remove\",\"name\":\"\\u0000\\ud800\"}\n",
            "GET /metrics HTTP/1.1\r\n",
            "GET ",
            "\r\n",
            "\n",
            "[[[[[[[[",
            "{\"op\":",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
        vec(any::<u8>(), 0..20),
        (any::<u8>(), 0..300usize).prop_map(|(byte, count)| vec![byte; count]),
    ];
    vec(part, 0..8).prop_map(|parts| parts.concat())
}

#[test]
fn every_kind_of_question_is_answered() {
    for mut frame in questions() {
        let len = frame.len();
        frame.resize(200, 0);
        assert!(Responder::new(ME, &[]).answer(&mut frame, len).is_some());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever bytes of a question are changed, wherever it ends, and however little room there is: an answer that fits and
    /// comes from this station, or a frame that is as it was.
    #[test]
    fn changed_questions_do_no_harm(
        which in 0..8usize,
        changes in vec((0..90usize, any::<u8>()), 0..4),
        cut in 1..120usize,
        room in 0..80usize,
    ) {
        let mut frame = questions().swap_remove(which);
        for (at, value) in changes {
            let at = at % frame.len();
            frame[at] = value;
        }
        frame.truncate(cut);
        let len = frame.len();
        frame.resize(len + room, 0xee);
        let before = frame.clone();
        match Responder::new(ME, &[]).answer(&mut frame, len) {
            Some(answer) => prop_assert!(answer <= frame.len() && frame[6..12] == ME),
            None => prop_assert_eq!(frame, before),
        }
    }

    /// Any value under any key, and any byte in the place of another: what is taken keeps to the limits.
    #[test]
    fn configurations_keep_to_the_limits_or_are_refused(
        values in vec((0..14usize, value()), 0..4),
        at in any::<Index>(),
        byte in prop::option::of(any::<u8>()),
    ) {
        const KEYS: [&str; 14] = [
            "cniVersion", "name", "type", "backend", "control", "bridge", "dir", "keys", "queues", "mtu", "args", "ipam",
            "runtimeConfig", "prevResult",
        ];
        let mut config = json!({"cniVersion": "1.1.0", "name": "a", "type": "usernic-cni"});
        for (key, value) in values {
            config[KEYS[key]] = value;
        }
        let mut bytes = config.to_string().into_bytes();
        if let Some(byte) = byte {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(config) = Config::read(&bytes) {
            prop_assert!(config.dir.is_absolute() && !config.name.is_empty() && !config.name.contains('/'));
            if config.check().is_ok() {
                prop_assert!(config.mtu.is_none_or(|mtu| (68..=9710).contains(&mtu)));
                prop_assert_ne!(config.uid(), u32::MAX);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever a client sends, each line of it is answered in a line, or the connection ends; the next client is served.
    #[test]
    fn a_control_socket_answers_line_by_line_or_ends_the_connection(sent in sent()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let answer = |request: Request| Ok(match request {
            Request::Metrics => "some 1\n".into(),
            other => json!([format!("{other:?}")]),
        });
        let _control = Control::serve(&path, SocketAccess::default(), Arc::new(answer)).unwrap();
        let ask = |bytes: &[u8]| {
            let mut stream = UnixStream::connect(&path).unwrap();
            // It may have ended the connection already.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            String::from_utf8(answer).unwrap()
        };
        let answered = ask(&sent);
        let (lines, http) = match answered.split_once("HTTP/1.1 ") {
            Some((lines, http)) => (lines, Some(http)),
            None => (&answered[..], None),
        };
        prop_assert!(lines.is_empty() || lines.ends_with('\n'));
        prop_assert!(lines.lines().count() <= sent.iter().filter(|byte| **byte == b'\n').count());
        for line in lines.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            prop_assert!(line.get("ok").is_some() != line.get("error").is_some());
        }
        prop_assert!(http.is_none_or(|http| http.starts_with("200 OK\r\n") || http.starts_with("404 Not Found\r\n")));
        prop_assert_eq!(ask(b"{\"op\":\"stats\"}\n"), "{\"ok\":[\"Stats\"]}\n");
    }
}
