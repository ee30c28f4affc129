//! A running guest, and scripts in it.
//!
//! The console is QEMU's standard output, which errors show. Scripts and their answers go over the second serial line,
//! a socket: see `init.sh`. Whatever is waited for is waited for so long and no longer, and QEMU dies with us.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::Machine;
use crate::process::{self, Process, Surroundings};

/// For a guest to come up: 3 to 8 s where nobody else wants the cores.
const BOOT: Duration = Duration::from_secs(120);

/// For it to go down.
const DOWN: Duration = Duration::from_secs(30);

/// How often a wait looks whether QEMU lives and whether we are to stop.
const TICK: Duration = Duration::from_millis(50);

/// Bytes of a script, encoded, that the guest's serial line holds without a reader.
const MOST_SCRIPT: usize = 4000;

/// A machine's parts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Memory, in MiB: one shared memfd.
    pub memory: u32,
    /// Processors.
    pub cpus: u32,
    /// Further arguments of QEMU's: the devices.
    pub devices: Vec<String>,
    /// Further words of the kernel's command line.
    pub append: String,
    /// Show the console as it comes, and what is done when.
    pub echo: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            memory: 512,
            cpus: 1,
            devices: Vec::new(),
            append: String::new(),
            echo: false,
        }
    }
}

/// A running guest. Its end is by [`Vm::power_off`]; on drop it is killed.
pub struct Vm {
    qemu: Process,
    agent: UnixStream,
    pending: Vec<u8>,
    scripts: u32,
    echo: bool,
}

/// What became of a script.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: u8,
    /// All that it wrote, standard error with it.
    pub output: Vec<u8>,
}

impl Vm {
    /// Boots, and waits until the guest takes scripts. `dir` is for the agent's socket: one guest at a time.
    pub fn boot(machine: &Machine, config: &Config, initramfs: &Path, dir: &Path) -> Result<Self> {
        let socket = dir.join("agent");
        let _ = std::fs::remove_file(&socket);
        let mut command = machine.qemu.command();
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        // KVM is not always what it says it is inside a virtual machine.
        command.args([
            "-M",
            "q35,kernel-irqchip=split",
            "-cpu",
            "max",
            "-accel",
            "tcg,thread=multi",
        ]);
        command.args(["-smp", &config.cpus.to_string(), "-m", &config.memory.to_string()]);
        let memory = format!("memory-backend-memfd,id=mem,size={}M,share=on", config.memory);
        command.args(["-object", &memory, "-machine", "memory-backend=mem"]);
        command.args(["-serial", "stdio", "-serial", "chardev:agent", "-chardev"]);
        command.arg(format!("socket,id=agent,path={},server=on,wait=off", socket.display()));
        command
            .arg("-kernel")
            .arg(&machine.guest.kernel)
            .arg("-initrd")
            .arg(initramfs);
        let append = format!("console=ttyS0 panic=-1 quiet {}", config.append);
        command.args(["-append", append.trim_end()]).args(&config.devices);
        let surroundings = Surroundings {
            no_stdin: true,
            echo: config.echo,
            ..Default::default()
        };
        let line = crate::peers::shown(&command);
        let mut qemu = Process::spawn("guest", command, &surroundings)?;
        let agent = connect(&mut qemu, &socket).with_context(|| format!("started as: {line}"))?;
        let mut vm = Vm {
            qemu,
            agent,
            pending: Vec::new(),
            scripts: 0,
            echo: config.echo,
        };
        let start = Instant::now();
        let ready = vm.line(start + BOOT).with_context(|| format!("started as: {line}"))?;
        ensure!(
            ready == "@ready",
            "the guest says {ready:?} rather than that it is ready"
        );
        vm.took("boot", start);
        Ok(vm)
    }

    /// What the console and QEMU itself have shown.
    pub fn console(&self) -> String {
        self.qemu.output()
    }

    /// Runs a script of the guest's shell to its end. `name` is for messages.
    pub fn run(&mut self, name: &str, script: &str, limit: Duration) -> Result<Ended> {
        let start = Instant::now();
        let end = start + limit;
        self.scripts += 1;
        let id = self.scripts;
        let line = format!("{id} {}\n", base64(script.as_bytes()));
        ensure!(
            line.len() <= MOST_SCRIPT,
            "script \"{name}\" is too long: put it into the initramfs"
        );
        self.agent.write_all(line.as_bytes()).with_context(|| self.tail(name))?;
        let head = self.line(end).with_context(|| format!("script \"{name}\""))?;
        let head = answer(&head, id).with_context(|| format!("script \"{name}\": the guest answers {head:?}"))?;
        while self.pending.len() < head.1 {
            self.more(end).with_context(|| format!("output of script \"{name}\""))?;
        }
        self.took(name, start);
        Ok(Ended {
            status: head.0,
            output: self.pending.drain(..head.1).collect(),
        })
    }

    /// Runs a script that must succeed; what it wrote.
    pub fn ok(&mut self, name: &str, script: &str, limit: Duration) -> Result<String> {
        let ended = self.run(name, script, limit)?;
        let output = String::from_utf8_lossy(&ended.output).into_owned();
        if ended.status != 0 {
            bail!(
                "script \"{name}\" ended with status {}:\n{}",
                ended.status,
                indented(&output)
            );
        }
        Ok(output)
    }

    /// Ends the guest in order.
    pub fn power_off(mut self) -> Result<()> {
        self.agent
            .write_all(format!("0 {}\n", base64(b"poweroff -f")).as_bytes())?;
        self.qemu.wait_success(DOWN)
    }

    fn took(&self, what: &str, start: Instant) {
        if self.echo {
            eprintln!("guest: {what} ({:.1} s)", start.elapsed().as_secs_f64());
        }
    }

    fn tail(&self, name: &str) -> String {
        format!("script \"{name}\"{}", self.qemu.tail())
    }

    /// The next line that the guest sends.
    fn line(&mut self, end: Instant) -> Result<String> {
        loop {
            if let Some(at) = self.pending.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=at).collect();
                return Ok(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            self.more(end)?;
        }
    }

    /// Reads more of what the guest sends.
    fn more(&mut self, end: Instant) -> Result<()> {
        let mut buffer = [0; 65536];
        loop {
            match self.agent.read(&mut buffer) {
                Ok(0) => {
                    // The console's last words, a panic's perhaps, come with the end of QEMU.
                    let _ = self.qemu.wait(Duration::from_secs(5));
                    bail!("the guest is gone{}", self.qemu.tail());
                }
                Ok(n) => {
                    self.pending.extend(&buffer[..n]);
                    return Ok(());
                }
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).with_context(|| format!("the guest's serial line{}", self.qemu.tail())),
            }
            process::check_interrupted()?;
            if Instant::now() >= end {
                bail!("no answer of the guest in time{}", self.qemu.tail());
            }
        }
    }
}

fn connect(qemu: &mut Process, socket: &Path) -> Result<UnixStream> {
    let end = Instant::now() + BOOT;
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(Duration::from_secs(20)))?;
            return Ok(stream);
        }
        if let Some(status) = qemu.exited()? {
            bail!("QEMU: {}{}", process::describe(status), qemu.tail());
        }
        ensure!(
            Instant::now() < end,
            "QEMU does not listen at {}{}",
            socket.display(),
            qemu.tail()
        );
        process::sleep(Duration::from_millis(5))?;
    }
}

/// "@ID STATUS LENGTH": status and length, if it is for this script.
fn answer(line: &str, id: u32) -> Option<(u8, usize)> {
    let mut words = line.strip_prefix('@')?.split(' ');
    let fits = words.next()? == id.to_string();
    let values = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (fits && words.next().is_none()).then_some(values)
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, &b| w << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let bits = word >> (18 - 6 * digit) & 63;
            text.push(if digit <= chunk.len() {
                char::from(DIGITS[bits as usize])
            } else {
                '='
            });
        }
    }
    text
}

fn indented(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(30);
    lines[from..].iter().map(|l| format!("    {l}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xfb, 0xfe]), "//v+");
    }

    #[test]
    fn answers() {
        assert_eq!(answer("@7 0 12", 7), Some((0, 12)));
        assert_eq!(answer("@7 127 0", 7), Some((127, 0)));
        for line in ["@8 0 12", "7 0 12", "@7 0", "@7 0 12 1", "@7 256 1", "insmod failed"] {
            assert_eq!(answer(line, 7), None, "{line}");
        }
    }
}
