//! Captures, written and read by code that shares nothing with the product: it is the judge of what arrived.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;

/// Writes frames as a capture of Ethernet with timestamps a millisecond apart.
pub fn write(path: &Path, frames: &[Vec<u8>]) -> Result<()> {
    let mut bytes = Vec::new();
    let mut put = |word: u32| bytes.extend_from_slice(&word.to_le_bytes());
    // magic, version 2.4, time zone, accuracy, snapshot length, link type
    [MICROSECONDS, 0x0004_0002, 0, 0, 262_144, ETHERNET]
        .into_iter()
        .for_each(&mut put);
    for (i, frame) in frames.iter().enumerate() {
        let (i, len) = (i as u32, frame.len() as u32);
        for word in [1_700_000_000 + i / 1000, i % 1000 * 1000, len, len] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(frame);
    }
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

/// The frames of a capture, whole.
pub fn read(path: &Path) -> Result<Vec<Vec<u8>>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    parse(&bytes).with_context(|| path.display().to_string())
}

fn parse(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let word = |at: usize| -> Result<u32> {
        let four = bytes
            .get(at..at + 4)
            .with_context(|| format!("ends at byte {}", bytes.len()))?;
        Ok(u32::from_le_bytes(four.try_into()?))
    };
    let magic = word(0)?;
    if ![MICROSECONDS, NANOSECONDS].contains(&magic) {
        bail!("magic number {magic:#x}");
    }
    if word(20)? != ETHERNET {
        bail!("link type {}", word(20)?);
    }
    let mut frames = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let (kept, len) = (word(at + 8)?, word(at + 12)?);
        if kept != len {
            bail!("frame {} is cut: {kept} bytes of {len}", frames.len());
        }
        let frame = bytes.get(at + 16..at + 16 + len as usize);
        frames.push(
            frame
                .with_context(|| format!("frame {} is cut by the end", frames.len()))?
                .to_vec(),
        );
        at += 16 + len as usize;
    }
    Ok(frames)
}

/// An error that names the first difference.
pub fn same(sent: &[Vec<u8>], arrived: &[Vec<u8>]) -> Result<()> {
    for (i, (a, b)) in sent.iter().zip(arrived).enumerate() {
        if a != b {
            let at = a
                .iter()
                .zip(b)
                .position(|(x, y)| x != y)
                .unwrap_or(a.len().min(b.len()));
            let elsewhere = match sent.iter().position(|s| s == b) {
                Some(j) => format!("; what arrived is frame {j}"),
                None => "; what arrived was never sent".to_owned(),
            };
            bail!(
                "frame {i} of {}: {} bytes sent, {} arrived, different from byte {at} on{elsewhere}",
                sent.len(),
                a.len(),
                b.len()
            );
        }
    }
    if sent.len() != arrived.len() {
        bail!("{} frames sent, {} arrived", sent.len(), arrived.len());
    }
    Ok(())
}

/// Frames of the given lengths, each different: Ethernet with the type of local experiments (0x88B5), a number, and
/// bytes that follow from it.
pub fn frames(lengths: impl IntoIterator<Item = usize>) -> Vec<Vec<u8>> {
    let frame = |(i, len): (usize, usize)| {
        let mut frame = vec![0x02, 0, 0, 0, 0, 0x02, 0x02, 0, 0, 0, 0, 0x01, 0x88, 0xb5];
        frame.extend_from_slice(&(i as u32).to_be_bytes());
        let mut random = Random(i as u64 + 1);
        while frame.len() < len {
            frame.extend_from_slice(&random.draw().to_le_bytes());
        }
        frame.truncate(len);
        frame
    };
    lengths.into_iter().enumerate().map(frame).collect()
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pcap");
        let sent = frames([60, 61, 1514, 9000]);
        write(&path, &sent).unwrap();
        assert_eq!(read(&path).unwrap(), sent);
        let bytes = fs::read(&path).unwrap();
        assert!(parse(&bytes[..bytes.len() - 1]).is_err());
        assert!(parse(&bytes[1..]).is_err());
    }

    #[test]
    fn differences_are_named() {
        let sent = frames([60, 70, 80]);
        assert!(same(&sent, &sent.clone()).is_ok());
        assert!(
            same(&sent, &sent[..2])
                .unwrap_err()
                .to_string()
                .contains("3 frames sent, 2 arrived")
        );
        let swapped = vec![sent[0].clone(), sent[2].clone(), sent[1].clone()];
        assert!(
            same(&sent, &swapped)
                .unwrap_err()
                .to_string()
                .contains("what arrived is frame 2")
        );
        let mut flipped = sent.clone();
        flipped[1][33] ^= 1;
        let text = same(&sent, &flipped).unwrap_err().to_string();
        assert!(text.contains("from byte 33") && text.contains("never sent"), "{text}");
    }
}
