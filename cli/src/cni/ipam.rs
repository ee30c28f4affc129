//! The plugin that gives addresses, called as the specification has it ("Delegated Plugin Execution").

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::config::{Attached, Config};
use super::failure::{Code, Failure, OrFail};

/// Calls the configuration's plugin, found in one of `folders`, with the configuration; its result. `None`: there is no
/// such plugin, or it said nothing.
pub fn call(
    config: &Config,
    text: &[u8],
    folders: &str,
    command: &str,
    to: Option<&Attached>,
) -> Result<Option<Value>, Failure> {
    let kind = config.ipam.as_ref().map(|ipam| ipam.kind.as_str());
    let Some(kind) = kind.filter(|kind| !kind.is_empty()) else {
        return Ok(None);
    };
    run(kind, text, folders, command, to)
        .with_context(|| format!("{command} of the address plugin {kind}"))
        .or_fail(Code::Ipam)
}

fn run(kind: &str, text: &[u8], folders: &str, command: &str, to: Option<&Attached>) -> Result<Option<Value>> {
    if kind.contains('/') {
        bail!("a plugin's name has no /");
    }
    let mut paths = folders
        .split(':')
        .filter(|folder| !folder.is_empty())
        .map(|folder| PathBuf::from(folder).join(kind));
    let program = paths
        .find(|path| path.is_file())
        .with_context(|| format!("not in CNI_PATH={folders:?}"))?;
    let mut line = Command::new(&program);
    line.env("CNI_COMMAND", command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if let Some(to) = to {
        line.env("CNI_CONTAINERID", &to.container)
            .env("CNI_IFNAME", &to.interface);
    }
    let mut child = line.spawn().with_context(|| program.display().to_string())?;
    if let Some(mut input) = child.stdin.take() {
        // Who does not read it has his reasons.
        let _ = input.write_all(text);
    }
    let mut output = Vec::new();
    let read = child
        .stdout
        .take()
        .map_or(Ok(0), |stdout| stdout.take(1 << 20).read_to_end(&mut output));
    let status = child.wait()?;
    read?;
    if !status.success() {
        let answer: Value = serde_json::from_slice(&output).unwrap_or_default();
        match answer["msg"].as_str() {
            Some(text) => bail!("{text}"),
            None => bail!("{status}: {}", String::from_utf8_lossy(&output).trim()),
        }
    }
    if output.trim_ascii().is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&output).context("its result")?))
}
