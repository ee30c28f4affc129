//! The cases, in the order in which they run.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use usernic::{Burst, Checksum};

use crate::Case;
use crate::frames::{capture, checksums_are_right, frame, ipv4};
use crate::world::{World, flush, from_peer, heard, receive, send, to_peer, until};

/// Starts of a port in `restart`.
const RESTARTS: usize = 100;

pub const CASES: &[Case] = &[
    with_peer("open", "the port opens, its link comes up, and it opens again", open),
    with_peer("capture-out", "a capture to the peer, byte for byte", capture_out),
    with_peer("capture-in", "a capture from the peer, byte for byte", capture_in),
    with_peer("plain-memory", "the same without huge pages", plain_memory),
    with_peer("jumbo", "frames of 60 to 9014 bytes, both ways", jumbo),
    with_peer(
        "checksum",
        "checksums made by the device, and their state on receipt",
        checksum,
    ),
    with_peer(
        "segmentation",
        "a TCP segment of 30,000 bytes, cut by the device",
        segmentation,
    ),
    with_peer("vlan", "tags inserted, stripped and filtered", vlan),
    with_peer("queues", "two queue pairs, with frames of many flows", queues),
    with_peer("interrupt", "a wait ends with the interrupt of a frame", interrupt),
    with_peer("statistics", "the device's counters agree with ours", statistics),
    with_peer("restart", "a hundred starts, each with a frame both ways", restart),
    asking("link", "the link goes down and comes up again", link),
    asking("pf-reset", "the PF is reset while the port is open", pf_reset),
];

const fn with_peer(name: &'static str, shows: &'static str, run: fn(&World) -> Result<String>) -> Case {
    Case {
        name,
        shows,
        peer: true,
        model: false,
        run,
    }
}

const fn asking(name: &'static str, shows: &'static str, run: fn(&World) -> Result<String>) -> Case {
    Case {
        name,
        shows,
        peer: true,
        model: true,
        run,
    }
}

fn open(world: &World) -> Result<String> {
    let begin = Instant::now();
    let (port, queue) = world.open("")?;
    let first = begin.elapsed();
    let (mac, memory) = (port.mac(), port.memory().to_owned());
    ensure!(mac != [0; 6] && mac[0] & 1 == 0, "the address is {mac:x?}");
    ensure!(port.link().speed > 0, "a link without speed: {:?}", port.link());
    drop((queue, port));
    let (port, _queue) = world.open("").context("once more")?;
    ensure!(port.mac() == mac, "another address: {:x?}, it was {mac:x?}", port.mac());
    Ok(format!("link up after {} ms; {memory}", first.as_millis()))
}

fn capture_out(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    let peer = world.peer()?;
    let frames = capture(peer.mac(), port.mac())?;
    to_peer(&mut queue, peer, port.mac(), &frames)?;
    Ok(format!("{} frames", frames.len()))
}

fn capture_in(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    let peer = world.peer()?;
    let frames = capture(port.mac(), peer.mac())?;
    from_peer(&mut queue, peer, &frames)?;
    Ok(format!("{} frames", frames.len()))
}

fn plain_memory(world: &World) -> Result<String> {
    let (port, mut queue) = world.open(",memory=memfd,queue_size=64")?;
    let (peer, mac) = (world.peer()?, port.mac());
    let frames: Vec<_> = (0..100).map(|i| frame(peer.mac(), mac, 60 + 14 * i, i)).collect();
    to_peer(&mut queue, peer, mac, &frames)?;
    let frames: Vec<_> = (0..100).map(|i| frame(mac, peer.mac(), 60 + 14 * i, i)).collect();
    from_peer(&mut queue, peer, &frames)?;
    Ok(port.memory().to_owned())
}

fn jumbo(world: &World) -> Result<String> {
    let lengths = [60, 61, 1514, 1515, 2047, 2048, 2049, 4096, 4097, 8999, 9014];
    for keys in [",mtu=9000", ",mtu=9000,buffer_size=1024"] {
        let (port, mut queue) = world.open(keys)?;
        let (peer, mac) = (world.peer()?, port.mac());
        let all = |to, from| -> Vec<_> {
            (0..66)
                .map(|i| frame(to, from, lengths[i % lengths.len()], i))
                .collect()
        };
        to_peer(&mut queue, peer, mac, &all(peer.mac(), mac)).context(keys)?;
        from_peer(&mut queue, peer, &all(mac, peer.mac())).context(keys)?;
    }
    Ok(String::new())
}

fn checksum(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    let (peer, mac) = (world.peer()?, port.mac());
    let mut burst = Burst::new(20);
    queue.alloc(&mut burst, 20);
    ensure!(burst.len() == 20, "{} buffers of 20", burst.len());
    let mut wanted = Vec::new();
    for (i, packet) in burst.iter_mut().enumerate() {
        let tcp = i % 2 == 0;
        let right = ipv4(peer.mac(), mac, tcp, (1000, 2000), &vec![i as u8; 100 + 60 * i]);
        let mut wrong = right.clone();
        let field = 34 + if tcp { 16 } else { 6 };
        wrong[24..26].fill(0x55);
        wrong[field..field + 2].fill(0xaa);
        packet.copy_from(&wrong)?;
        packet.request_checksum()?;
        wanted.push(right);
    }
    flush(&mut queue, &mut burst)?;
    while !wanted.is_empty() {
        // Of different flows, so in any order.
        let got = heard(peer, mac)?;
        let found = wanted.iter().position(|right| *right == got);
        let Some(found) = found else {
            bail!(
                "a frame of {} bytes is none of those with their checksums made",
                got.len()
            )
        };
        wanted.remove(found);
    }
    let mut frames = Vec::new();
    for i in 0..10 {
        let mut frame = ipv4(mac, peer.mac(), i % 2 == 0, (3000, 4000), &[i as u8; 200]);
        if i >= 5 {
            frame[60] ^= 1;
        }
        frames.push(frame);
    }
    for frame in &frames {
        peer.send(frame)?;
    }
    for (i, packet) in receive(&mut queue, peer.mac(), frames.len())?.into_iter().enumerate() {
        let state = packet.checksum();
        let right = state == Checksum::Right;
        ensure!(right == (i < 5), "frame {i} is told to be {state:?}");
    }
    Ok(String::new())
}

fn segmentation(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    let (peer, mac) = (world.peer()?, port.mac());
    let payload: Vec<u8> = (0..30_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
    let mut burst = Burst::new(1);
    queue.alloc(&mut burst, 1);
    let packet = burst.iter_mut().next().context("no buffer")?;
    packet.copy_from(&ipv4(peer.mac(), mac, true, (1000, 2000), &payload))?;
    packet.request_segmentation(1448)?;
    flush(&mut queue, &mut burst)?;
    let mut joined = Vec::new();
    let count = payload.len().div_ceil(1448);
    for i in 0..count {
        let got = heard(peer, mac).with_context(|| format!("segment {i} of {count}"))?;
        ensure!(checksums_are_right(&got), "segment {i}: wrong checksums");
        let sequence = u32::from_be_bytes([got[38], got[39], got[40], got[41]]);
        ensure!(
            sequence == 1 + joined.len() as u32,
            "segment {i} has the sequence number {sequence}"
        );
        joined.extend_from_slice(&got[54..]);
    }
    ensure!(joined == payload, "the segments are not the packet that was cut");
    Ok(format!("{count} segments"))
}

fn vlan(world: &World) -> Result<String> {
    let (port, mut queue) = world.open(",vlan=100,vlan_strip=1")?;
    let (peer, mac) = (world.peer()?, port.mac());
    let tagged = world.tagged.as_ref().context("the peer has no interface in VLAN 100")?;
    let mut burst = Burst::new(1);
    queue.alloc(&mut burst, 1);
    let plain = frame(peer.mac(), mac, 300, 7);
    let packet = burst.iter_mut().next().context("no buffer")?;
    packet.copy_from(&plain)?;
    packet.set_vlan_tag(Some(100));
    flush(&mut queue, &mut burst)?;
    let got = heard(tagged, mac).context("in VLAN 100")?;
    ensure!(got == plain, "{} bytes came in VLAN 100, not the frame", got.len());
    let back = frame(mac, peer.mac(), 300, 8);
    tagged.send(&back)?;
    let got = receive(&mut queue, peer.mac(), 1)?.remove(0);
    ensure!(got.vlan_tag() == Some(100), "the tag is {:?}", got.vlan_tag());
    ensure!(got.into_private() == back, "the frame is another one");
    Ok(String::new())
}

fn queues(world: &World) -> Result<String> {
    let (port, first) = world.open(",queues=2")?;
    let peer = world.peer()?;
    let mut both = [first, port.queue(1)?];
    let count = 64u16;
    for flow in 0..count {
        peer.send(&ipv4(
            port.mac(),
            peer.mac(),
            // TCP: an 82599's functions have no say in what is hashed, and Linux's PF leaves the ports of UDP out.
            true,
            (1000 + flow * 37, 53),
            &[flow as u8; 64],
        ))?;
    }
    let mut shares = [0u16; 2];
    let mut burst = Burst::new(32);
    until("all flows", || {
        for (queue, share) in both.iter_mut().zip(&mut shares) {
            queue.rx(&mut burst);
            for packet in burst.drain() {
                let mut source = [0; 6];
                packet.read_at(6, &mut source)?;
                *share += u16::from(source == peer.mac());
            }
        }
        Ok(shares[0] + shares[1] >= count)
    })?;
    ensure!(shares[0] + shares[1] == count, "{shares:?} frames of {count} flows");
    ensure!(shares[0] > 0 && shares[1] > 0, "a queue got nothing: {shares:?}");
    for queue in &mut both {
        let frames = [frame(peer.mac(), port.mac(), 200, queue.index().into())];
        to_peer(queue, peer, port.mac(), &frames)?;
    }
    Ok(format!("{} and {} frames", shares[0], shares[1]))
}

fn interrupt(world: &World) -> Result<String> {
    let (port, mut queue) = world.open(",moderation=100")?;
    let (peer, mac) = (world.peer()?, port.mac());
    let mut latest = Duration::ZERO;
    let mut burst = Burst::new(32);
    for round in 0..20 {
        // Whatever else came.
        while queue.rx(&mut burst) > 0 {
            burst.clear();
        }
        let sent = frame(mac, peer.mac(), 100, round);
        std::thread::scope(|scope| -> Result<()> {
            let sender = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                peer.send(&sent).map(|()| Instant::now())
            });
            let end = Instant::now() + Duration::from_secs(5);
            loop {
                let begin = Instant::now();
                // A wake without a frame is nothing bad: the vector may have been raised for one that was taken already.
                let there = queue.wait(Some(Duration::from_secs(5)))?;
                let woken = Instant::now();
                ensure!(
                    there || woken - begin < Duration::from_secs(4),
                    "round {round}: nothing woke us"
                );
                queue.rx(&mut burst);
                if burst.drain().any(|packet| packet.into_private() == sent) {
                    let at = sender.join().map_err(|_| anyhow::anyhow!("the sender"))??;
                    latest = latest.max(woken.saturating_duration_since(at));
                    return Ok(());
                }
                ensure!(Instant::now() < end, "round {round}: the frame did not come");
            }
        })?;
    }
    Ok(format!("woken after {} us at the latest", latest.as_micros()))
}

fn statistics(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    let (peer, mac) = (world.peer()?, port.mac());
    let frames: Vec<_> = (0..50).map(|i| frame(peer.mac(), mac, 64 + i, i)).collect();
    to_peer(&mut queue, peer, mac, &frames)?;
    let frames: Vec<_> = (0..30).map(|i| frame(mac, peer.mac(), 64 + i, i)).collect();
    from_peer(&mut queue, peer, &frames)?;
    let (ours, device) = (port.stats(), port.device_stats().context("no device statistics")?);
    ensure!(
        device.tx_packets == ours.tx_packets && device.tx_packets == 50,
        "the device sent {}, we {}",
        device.tx_packets,
        ours.tx_packets
    );
    ensure!(
        device.rx_packets >= 30 && device.rx_packets >= ours.rx_packets,
        "the device received {}, we {}",
        device.rx_packets,
        ours.rx_packets
    );
    ensure!(
        (ours.tx_errors, ours.rx_errors, ours.anomalies) == (0, 0, 0),
        "{ours:?}"
    );
    Ok(String::new())
}

fn restart(world: &World) -> Result<String> {
    let begin = Instant::now();
    for round in 0..RESTARTS {
        let (port, mut queue) = world.open("").with_context(|| format!("start {round}"))?;
        once(world, &port, &mut queue, round).with_context(|| format!("start {round}"))?;
    }
    let each = begin.elapsed().as_millis() as usize / RESTARTS;
    Ok(format!("{RESTARTS} starts, {each} ms each"))
}

/// A frame each way.
fn once(world: &World, port: &usernic::Port, queue: &mut usernic::Queue, seed: usize) -> Result<()> {
    let (peer, mac) = (world.peer()?, port.mac());
    to_peer(queue, peer, mac, &[frame(peer.mac(), mac, 128, seed)])?;
    from_peer(queue, peer, &[frame(mac, peer.mac(), 128, seed)])
}

fn link(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    once(world, &port, &mut queue, 1)?;
    world.ask("link-down")?;
    until("a link that is down", || Ok(!port.link().up))?;
    world.ask("link-up")?;
    until("a link that is up", || Ok(port.link().up))?;
    // The peer's link comes up by itself, some time.
    again(world, &port, &mut queue)?;
    Ok(String::new())
}

fn pf_reset(world: &World) -> Result<String> {
    let (port, mut queue) = world.open("")?;
    once(world, &port, &mut queue, 1)?;
    world.ask("reset-begin")?;
    until("a link that is down", || Ok(!port.link().up))?;
    // Nothing moves, and nothing waits.
    let mut burst = Burst::new(1);
    queue.alloc(&mut burst, 1);
    let begin = Instant::now();
    queue.tx(&mut burst);
    queue.rx(&mut burst);
    ensure!(
        begin.elapsed() < Duration::from_secs(1),
        "a burst waits for a PF in reset"
    );
    burst.clear();
    world.ask("reset-end")?;
    until("a link that is up", || Ok(port.link().up))?;
    again(world, &port, &mut queue)?;
    Ok(String::new())
}

/// Frames pass again, both ways, as soon as the peer's link is back.
fn again(world: &World, port: &usernic::Port, queue: &mut usernic::Queue) -> Result<()> {
    let (peer, mac) = (world.peer()?, port.mac());
    let mut number = 0;
    let mut burst = Burst::new(32);
    until("a frame to the peer", || {
        number += 1;
        if number % 20 == 1 {
            send(queue, &[frame(peer.mac(), mac, 90, 77)])?;
        }
        Ok(peer.receive(mac)?.is_some())
    })?;
    until("a frame from the peer", || {
        number += 1;
        if number % 20 == 1 {
            // Refused while the interface is down.
            let _ = peer.send(&frame(mac, peer.mac(), 90, 78));
        }
        queue.rx(&mut burst);
        Ok(burst
            .drain()
            .any(|packet| packet.into_private().get(6..12) == Some(&peer.mac()[..])))
    })
}
