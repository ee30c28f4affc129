//! The administrator's socket: one command a line, one answer a line, so that scripts can pull cables and reset PFs.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::Machine;
use crate::message::Request;
use crate::nic::Nic;
use crate::pf::{Mac, Speed};

/// What can be said.
pub const HELP: &str = "link up [100m|1g|2.5g|5g|10g] | link down | vf-link VF on|off | reset [begin|end] | lose VF | \
mac VF ADDRESS|none | vlan VF ID [PRIORITY] | vlan VF none | trust VF on|off | spoof VF on|off | rss-query VF on|off | \
deaf VF on|off | refuse VF REQUEST COUNT | mdd on|off | promiscuous on|off | mtu BYTES | inject HEX | collect | stats | help";

/// Takes commands at a socket, in threads of its own. The socket is there when this returns.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(machine: &Arc<Machine>, path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
    let machine = Arc::clone(machine);
    thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let machine = Arc::clone(&machine);
            thread::spawn(move || {
                // Who hangs up has heard enough.
                let _ = converse(&machine, &stream);
            });
        }
    })?;
    Ok(())
}

fn converse(machine: &Machine, stream: &UnixStream) -> std::io::Result<()> {
    let mut answers = stream;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let answer = machine
            .act(|nic| execute(nic, &line))
            .unwrap_or_else(|error| format!("error: {error:#}"));
        writeln!(answers, "{answer}")?;
    }
    Ok(())
}

/// Executes one command.
fn execute(nic: &mut Nic, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["link", "down"] => nic.set_link(None),
        ["link", "up"] => nic.set_link(Some(Speed::G10)),
        ["link", "up", speed] => nic.set_link(Some(parse_speed(speed)?)),
        ["vf-link", vf, on] => nic.set_link_enabled(parse_vf(nic, vf)?, parse_switch(on)?),
        ["reset"] => {
            nic.begin_reset();
            nic.end_reset();
        }
        ["reset", "begin"] => nic.begin_reset(),
        ["reset", "end"] => nic.end_reset(),
        ["lose", vf] => nic.lose_clearance(parse_vf(nic, vf)?),
        ["mac", vf, "none"] => nic.set_mac(parse_vf(nic, vf)?, [0; 6]),
        ["mac", vf, mac] => nic.set_mac(parse_vf(nic, vf)?, parse_mac(mac)?),
        ["vlan", vf, "none"] => nic.set_port_vlan(parse_vf(nic, vf)?, None),
        ["vlan", vf, id] => nic.set_port_vlan(parse_vf(nic, vf)?, Some((parse_vlan(id)?, 0))),
        ["vlan", vf, id, priority] => {
            nic.set_port_vlan(parse_vf(nic, vf)?, Some((parse_vlan(id)?, priority.parse()?)));
        }
        ["trust", vf, on] => nic.set_trusted(parse_vf(nic, vf)?, parse_switch(on)?),
        ["spoof", vf, on] => {
            let vf = parse_vf(nic, vf)?;
            nic.policy(vf).spoof_check = parse_switch(on)?;
        }
        ["rss-query", vf, on] => {
            let vf = parse_vf(nic, vf)?;
            nic.policy(vf).rss_query = parse_switch(on)?;
        }
        ["deaf", vf, on] => {
            let vf = parse_vf(nic, vf)?;
            nic.policy(vf).deaf = parse_switch(on)?;
        }
        ["refuse", vf, request, count] => {
            let request = request.parse().ok().and_then(Request::of);
            let request = request.ok_or_else(|| anyhow!("a request is a number, such as 5 for the longest frame"))?;
            let vf = parse_vf(nic, vf)?;
            nic.policy(vf).refuse(request, count.parse()?);
        }
        ["mdd", on] => nic.pf().malicious_detection = parse_switch(on)?,
        ["promiscuous", on] => nic.pf().promiscuous = parse_switch(on)?,
        ["mtu", bytes] => {
            let mtu = bytes.parse()?;
            ensure!((68..=9710).contains(&mtu), "an MTU of 68 to 9710");
            nic.pf().mtu = mtu;
        }
        ["inject", hex] => {
            let frame = parse_hex(hex)?;
            ensure!(nic.inject(&frame), "too short, or the link is down");
        }
        ["collect"] => return Ok(nic.collect().map_or_else(|| "none".into(), |frame| to_hex(&frame))),
        ["stats"] => return Ok(stats(nic).to_string()),
        ["help"] => return Ok(HELP.into()),
        _ => bail!("unknown command; there are: {HELP}"),
    }
    Ok("ok".into())
}

fn parse_vf(nic: &Nic, text: &str) -> Result<usize> {
    let vf = text.parse()?;
    ensure!(vf < nic.vf_count(), "there is no VF {vf}");
    Ok(vf)
}

fn parse_switch(text: &str) -> Result<bool> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bail!("on or off, not {text:?}"),
    }
}

fn parse_vlan(text: &str) -> Result<u16> {
    let vlan = text.parse()?;
    ensure!((1..4095).contains(&vlan), "a VLAN of 1 to 4094");
    Ok(vlan)
}

fn parse_speed(text: &str) -> Result<Speed> {
    Ok(match text {
        "100m" => Speed::M100,
        "1g" => Speed::G1,
        "2.5g" => Speed::G2_5,
        "5g" => Speed::G5,
        "10g" => Speed::G10,
        _ => bail!("100m, 1g, 2.5g, 5g or 10g, not {text:?}"),
    })
}

fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let mac = bytes.ok().and_then(|bytes| bytes.try_into().ok());
    mac.ok_or_else(|| anyhow!("{text:?} is no Ethernet address"))
}

fn parse_hex(text: &str) -> Result<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2).map(std::str::from_utf8);
    let bytes: Option<Vec<u8>> = pairs.map(|pair| u8::from_str_radix(pair.ok()?, 16).ok()).collect();
    bytes
        .filter(|_| text.len().is_multiple_of(2))
        .ok_or_else(|| anyhow!("a frame in hexadecimal digits, two a byte"))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What `stats` answers: counters, drops, complaints and faults of each VF.
pub fn stats(nic: &mut Nic) -> Value {
    let vfs = (0..nic.vf_count()).map(|vf| {
        let counters = *nic.counters(vf);
        let drops = nic.drops(vf);
        let offloads = nic.offloads(vf);
        let complaints: serde_json::Map<_, _> = nic
            .complaints(vf)
            .iter()
            .map(|(complaint, count)| (complaint.to_string(), count.into()))
            .collect();
        let faults: Vec<_> = nic.dma(vf).faults().iter().map(ToString::to_string).collect();
        let agreed = nic.policy(vf).agreed();
        json!({
            "packets_rx": counters.packets_rx,
            "octets_rx": counters.octets_rx,
            "multicast_rx": counters.multicast_rx,
            "packets_tx": counters.packets_tx,
            "octets_tx": counters.octets_tx,
            "dropped_no_descriptor": drops.no_descriptor,
            "dropped_queue_off": drops.queue_off,
            "dropped_receive_off": drops.receive_off,
            "dropped_too_long": drops.too_long,
            "dropped_spoofed": drops.spoofed,
            "dropped_no_crc": drops.no_crc,
            "segmented": offloads.segmented,
            "checksums_inserted": offloads.checksums,
            "tags_inserted": offloads.tagged,
            "gathered": offloads.gathered,
            "waiting": nic.waiting(vf),
            "interrupts": nic.interrupts_sent(vf),
            "halts": nic.halts(vf).iter().map(|halt| format!("{halt:?}")).collect::<Vec<_>>(),
            "complaints": complaints,
            "dma_windows": nic.dma(vf).len(),
            "dma_faults": nic.dma(vf).fault_count(),
            "dma_first_faults": faults,
            "clear_to_send": agreed.clear_to_send,
            "api": format!("{:?}", agreed.api),
            "xcast": format!("{:?}", agreed.xcast),
            "max_frame": agreed.max_frame,
            "vlans": agreed.vlans,
            "multicast_hashes": agreed.hashes.len(),
            "more_macs": agreed.more_macs.len(),
        })
    });
    let vfs: Vec<Value> = vfs.collect();
    json!({ "vfs": vfs, "wire_dropped": nic.wire_dropped() })
}
