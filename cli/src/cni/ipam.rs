//! The plugin that gives addresses, called as the specification has it ("Delegated Plugin Execution").

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, access};
use serde_json::Value;

use super::config::{Attached, Config};
use super::failure::{Code, Failure, OrFail};

/// How long the plugin may take: one may wait for a DHCP server.
const LIMIT: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 120 });

/// Calls the configuration's plugin, found in one of `folders`, with the configuration; its result. `None`: there is no
/// such plugin, or it said nothing.
pub fn call(
    config: &Config,
    text: &[u8],
    folders: &str,
    command: &str,
    to: Option<&Attached>,
) -> Result<Option<Value>, Failure> {
    let Some(kind) = kind(config) else { return Ok(None) };
    run(kind, text, folders, command, to)
        .with_context(|| format!("{command} of the address plugin {kind}"))
        .or_fail(Code::Ipam)
}

/// Whether the configuration's plugin, if it names one, can be called: before anything is made that only its DEL undoes.
pub fn check(config: &Config, folders: &str) -> Result<(), Failure> {
    let Some(kind) = kind(config) else { return Ok(()) };
    find(kind, folders)
        .map(drop)
        .with_context(|| format!("the address plugin {kind:?}"))
        .or_fail(Code::Ipam)
}

fn kind(config: &Config) -> Option<&str> {
    let ipam = config.ipam.as_ref()?;
    Some(ipam.kind.as_str()).filter(|kind| !kind.is_empty())
}

fn find(kind: &str, folders: &str) -> Result<PathBuf> {
    if kind.contains('/') {
        bail!("a plugin's name has no /");
    }
    let mut paths = folders
        .split(':')
        .filter(|folder| !folder.is_empty())
        .map(|folder| PathBuf::from(folder).join(kind));
    paths
        .find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok())
        .with_context(|| format!("no such program in CNI_PATH={folders:?}"))
}

fn run(kind: &str, text: &[u8], folders: &str, command: &str, to: Option<&Attached>) -> Result<Option<Value>> {
    let program = find(kind, folders)?;
    let mut line = Command::new(&program);
    line.env("CNI_COMMAND", command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if let Some(to) = to {
        line.env("CNI_CONTAINERID", &to.container)
            .env("CNI_IFNAME", &to.interface);
    }
    let mut child = line.spawn().with_context(|| program.display().to_string())?;
    let (input, text) = (child.stdin.take(), text.to_vec());
    let stdout = child.stdout.take();
    let (send, receive) = mpsc::channel();
    // Neither is waited for when the time is over. What the plugin does not read of its input is its matter.
    std::thread::spawn(move || input.map(|mut input| input.write_all(&text)));
    std::thread::spawn(move || {
        let mut output = Vec::new();
        let read = stdout.map_or(Ok(0), |stdout| stdout.take(1 << 20).read_to_end(&mut output));
        send.send(read.map(|_| output))
    });
    let end = Instant::now() + LIMIT;
    let late = |child: &mut Child| {
        let _ = child.kill();
        let _ = child.wait();
        anyhow::anyhow!("it did not end within {LIMIT:?}, and was killed")
    };
    let Ok(output) = receive.recv_timeout(LIMIT) else {
        return Err(late(&mut child));
    };
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() > end => return Err(late(&mut child)),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let output = output?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn plugin(script: &str, text: &[u8]) -> Result<Option<Value>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("give");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        // Another test's child may hold the script open for writing between its fork and exec.
        loop {
            let result = run("give", text, dir.path().to_str().unwrap_or_default(), "ADD", None);
            match &result {
                Err(error) if format!("{error:#}").contains("busy") => std::thread::yield_now(),
                _ => return result,
            }
        }
    }

    #[test]
    fn a_plugin_that_does_not_end_or_read_is_not_waited_for() {
        // More than a pipe holds, both ways.
        let text = vec![b' '; 1 << 20];
        let answer = plugin("echo '{\"ips\":[]}'", &text).unwrap();
        assert!(answer.unwrap()["ips"].is_array());
        let answer = plugin(
            "head -c 300000 /dev/zero | tr '\\0' ' '; cat >/dev/null; echo '{}'",
            &text,
        )
        .unwrap();
        assert!(answer.unwrap().is_object());
        for script in ["exec sleep 1000", "exec >/dev/null; exec sleep 1000"] {
            let error = format!("{:#}", plugin(script, b"{}").unwrap_err());
            assert!(error.contains("did not end"), "{script}: {error}");
        }
        let error = format!(
            "{:#}",
            plugin("echo '{\"msg\":\"none left\"}'; exit 1", b"{}").unwrap_err()
        );
        assert!(error.contains("none left"), "{error}");
    }
}
