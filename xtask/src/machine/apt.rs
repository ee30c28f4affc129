//! Debian packages without installing them: an apt that has lists, cache and status of its own.
//!
//! Its status file is empty, so that all that a package needs is downloaded along: what is unpacked runs by itself,
//! with its own loader and libraries. The mirror is the one that this machine's own apt uses, and apt checks the
//! signatures with Debian's archive keyring. Nothing of the system is changed, and no root is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::peers::which;
use crate::process;

const UPDATE: Duration = Duration::from_secs(180);
const DOWNLOAD: Duration = Duration::from_secs(900);
const UNPACK: Duration = Duration::from_secs(180);

const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// Where Debian's packages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    uri: String,
    keyring: PathBuf,
    /// The release that runs here, by its code name.
    pub release: String,
}

impl Mirror {
    /// The mirror of this machine's own apt.
    pub fn of_this_machine() -> Result<Self> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            ensure!(which(tool).is_some(), "no {tool} here: the packages are Debian's");
        }
        let release = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
        let release = value_of(&release, "VERSION_CODENAME").context("/etc/os-release names no VERSION_CODENAME")?;
        let keyring = KEYRINGS.map(PathBuf::from).into_iter().find(|p| p.is_file());
        let keyring = keyring.context("no keyring of Debian's archive: package debian-archive-keyring has it")?;
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        for entry in fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten() {
            files.push(entry?.path());
        }
        files.sort();
        let uri = files.iter().find_map(|file| {
            let text = fs::read_to_string(file).ok()?;
            match file.extension()?.to_str()? {
                "sources" => uri_of_stanzas(&text, &release),
                "list" => uri_of_lines(&text, &release),
                _ => None,
            }
        });
        let uri = uri.with_context(|| format!("no package source of apt's has the suite {release} with main"))?;
        Ok(Mirror { uri, keyring, release })
    }
}

/// `KEY=value` or `KEY="value"` in an os-release(5) file.
fn value_of(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='))?;
    Some(line.trim().trim_matches('"').to_owned()).filter(|v| !v.is_empty())
}

/// The first URI of a source of `suite` with the component main, of a file in sources.list(5)'s deb822 style.
fn uri_of_stanzas(text: &str, suite: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    lines.split(|l| l.trim().is_empty()).find_map(|stanza| {
        let field = |name: &str| {
            stanza.iter().find_map(|l| {
                let (key, value) = l.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let has = |name: &str, word: &str| field(name).is_some_and(|v| v.split_whitespace().any(|w| w == word));
        let off = field("Enabled").is_some_and(|v| v.eq_ignore_ascii_case("no"));
        let fits = has("Types", "deb") && has("Suites", suite) && has("Components", "main") && !off;
        fits.then(|| field("URIs")?.split_whitespace().next().map(str::to_owned))?
    })
}

/// The same of a file in the one-line style.
fn uri_of_lines(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let (uri, of) = (words.next()?, words.next()?);
        (of == suite && words.any(|w| w == "main")).then(|| uri.to_owned())
    })
}

/// An apt of its own, in a temporary directory.
pub struct Apt {
    dir: tempfile::TempDir,
    options: Vec<String>,
}

impl Apt {
    /// Reads the lists of `suites` from `mirror`.
    pub fn new(mirror: &Mirror, suites: &[&str]) -> Result<Self> {
        Self::of("deb", mirror, suites)
    }

    /// Reads the lists of source packages.
    pub fn for_sources(mirror: &Mirror, suites: &[&str]) -> Result<Self> {
        Self::of("deb-src", mirror, suites)
    }

    fn of(kind: &str, mirror: &Mirror, suites: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("xt-apt").tempdir()?;
        // As root, apt downloads as another user, who must get here.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let at = |name: &str| dir.path().join(name);
        for name in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(at(name))?;
        }
        fs::write(at("status"), "")?;
        let sources: String = suites
            .iter()
            .map(|suite| {
                format!(
                    "{kind} [signed-by={}] {} {suite} main\n",
                    mirror.keyring.display(),
                    mirror.uri
                )
            })
            .collect();
        fs::write(at("sources.list"), sources)?;
        let options = [
            ("Dir::Etc::SourceList", at("sources.list").display().to_string()),
            ("Dir::Etc::SourceParts", "-".into()),
            ("Dir::Etc::Preferences", "-".into()),
            ("Dir::Etc::PreferencesParts", "-".into()),
            ("Dir::State", at("state").display().to_string()),
            ("Dir::State::status", at("status").display().to_string()),
            ("Dir::Cache", at("cache").display().to_string()),
            ("Dir::Cache::archives", at("cache/archives").display().to_string()),
            ("APT::Architecture", "amd64".into()),
            ("APT::Install-Recommends", "false".into()),
            ("APT::Default-Release", String::new()),
            ("Acquire::Languages", "none".into()),
            ("Acquire::Retries", "2".into()),
            // The lock would be the system's; nobody else knows of this directory.
            ("Debug::NoLocking", "true".into()),
        ];
        let options = options
            .into_iter()
            .map(|(key, value)| format!("-o{key}={value}"))
            .collect();
        let apt = Apt { dir, options };
        process::run(
            "apt-get update",
            apt.command("apt-get", &["update", "--error-on=any"]),
            UPDATE,
        )
        .context("the package lists cannot be had")?;
        Ok(apt)
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).args(args);
        command
            .env("TMPDIR", self.dir.path())
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C")
            .current_dir(self.dir.path());
        command
    }

    /// The packages that `package` depends on by itself, in its control file's order.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let command = self.command("apt-cache", &["depends", "--important", package]);
        let output = process::run("apt-cache depends", command, UPDATE)?;
        let names = output.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    /// The version that would be installed of a package.
    pub fn version(&self, package: &str) -> Result<String> {
        let command = self.command("apt-cache", &["show", "--no-all-versions", package]);
        let output = process::run("apt-cache show", command, UPDATE)?;
        let version = output.lines().find_map(|l| l.strip_prefix("Version: "));
        // Of a package that was only built once more the source is the same.
        let version = version.and_then(|v| v.split("+b").next());
        version
            .map(str::to_owned)
            .with_context(|| format!("no version of {package}"))
    }

    /// Downloads packages with all that they need; `from` is the suite that is preferred over the others.
    pub fn download(&self, packages: &[&str], from: Option<&str>) -> Result<()> {
        let mut args = vec!["install", "--yes", "--download-only", "--no-install-recommends"];
        args.extend(from.iter().flat_map(|suite| ["--target-release", suite]));
        args.extend(packages);
        process::run(
            "apt-get install --download-only",
            self.command("apt-get", &args),
            DOWNLOAD,
        )
        .with_context(|| format!("{} cannot be downloaded", packages.join(" ")))
        .map(drop)
    }

    /// Downloads one package and nothing that it needs.
    pub fn download_alone(&self, package: &str) -> Result<()> {
        let mut command = self.command("apt-get", &["download", package]);
        command.current_dir(self.archives());
        process::run("apt-get download", command, DOWNLOAD)
            .with_context(|| format!("{package} cannot be downloaded"))
            .map(drop)
    }

    /// Downloads a version of a source package; the archive that its authors made.
    pub fn download_source(&self, package: &str, version: &str) -> Result<PathBuf> {
        let what = format!("{package}={version}");
        let mut command = self.command("apt-get", &["source", "--download-only", "--only-source", &what]);
        command.current_dir(self.archives());
        process::run("apt-get source", command, DOWNLOAD)
            .with_context(|| format!("the source of {what} cannot be had"))?;
        let files = fs::read_dir(self.archives())?.flatten().map(|entry| entry.path());
        files
            .into_iter()
            .find(|path| path.to_string_lossy().contains(".orig.tar."))
            .with_context(|| format!("the source of {what} has no .orig.tar"))
    }

    fn archives(&self) -> PathBuf {
        self.dir.path().join("cache/archives")
    }

    /// Unpacks all that was downloaded into a folder, and gives the packages' names with their versions.
    pub fn unpack(&self, into: &Path) -> Result<Vec<String>> {
        fs::create_dir_all(into)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(self.archives())? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "deb") {
                continue;
            }
            let mut command = Command::new("dpkg-deb");
            command.arg("--extract").arg(&path).arg(into);
            process::run("dpkg-deb --extract", command, UNPACK)?;
            let name = path.file_stem().context("a package without a name")?.to_string_lossy();
            // apt writes the colon of a version as %3a.
            names.push(name.replace("%3a", ":"));
        }
        if names.is_empty() {
            bail!("apt-get downloaded nothing into {}", self.archives().display());
        }
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_in_both_styles() {
        let stanzas = "# a comment\nTypes: deb-src\nURIs: http://no/\nSuites: bookworm\nComponents: main\n\n\
                       Types: deb\nURIs: http://security/\nSuites: bookworm-security\nComponents: main\n\n\
                       Types: deb deb-src\n# inside\nURIs: http://one/debian http://two\n\
                       Suites: bookworm bookworm-updates\nComponents: main contrib\n";
        assert_eq!(
            uri_of_stanzas(stanzas, "bookworm").as_deref(),
            Some("http://one/debian")
        );
        assert_eq!(
            uri_of_stanzas(stanzas, "bookworm-security").as_deref(),
            Some("http://security/")
        );
        assert_eq!(uri_of_stanzas(stanzas, "trixie"), None);
        let off = "Types: deb\nURIs: http://one\nSuites: bookworm\nComponents: main\nEnabled: no\n";
        assert_eq!(uri_of_stanzas(off, "bookworm"), None);

        let lines = "# deb http://no bookworm main\ndeb-src http://no bookworm main\n\
                     deb [arch=amd64 signed-by=/k] http://other stable-x main\n\
                     deb [ arch=amd64 ] http://one/debian bookworm contrib main\n";
        assert_eq!(uri_of_lines(lines, "bookworm").as_deref(), Some("http://one/debian"));
        assert_eq!(uri_of_lines(lines, "trixie"), None);
    }

    #[test]
    fn os_release() {
        let text = "NAME=\"Debian GNU/Linux\"\nVERSION_CODENAME=bookworm\nID=\"debian\"\n";
        assert_eq!(value_of(text, "VERSION_CODENAME").as_deref(), Some("bookworm"));
        assert_eq!(value_of(text, "ID").as_deref(), Some("debian"));
        assert_eq!(value_of(text, "VERSION"), None);
    }
}
