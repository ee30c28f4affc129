//! `usernic container`: the least that a container must be given for its ports, in the words of each engine.
//!
//! What a port needs is the library's ([`usernic::needs`]); here it becomes text, by way of each format's own types.

mod cdi;
mod engine;
mod model;
mod oci;
mod pod;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use serde_json::Value;
use usernic::spec::{PortSpec, SpecError};

use crate::common::HostArgs;
use model::{Container, Page};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// A port of the container; may be repeated
    #[arg(long, value_name = "SPEC")]
    port: Vec<Port>,
    /// A virtual function of the container, by address or interface, bound to vfio-pci; may be repeated
    #[arg(long, value_name = "DEVICE")]
    vf: Vec<String>,
    /// What to print
    #[arg(long, value_name = "FORMAT", default_value = "all")]
    format: Format,
    /// The container's name
    #[arg(long, value_name = "NAME", default_value = "usernic")]
    name: String,
    /// The image
    #[arg(long, value_name = "IMAGE", default_value = "localhost/usernic")]
    image: String,
    /// A folder with the root file system, in place of an image
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
    /// User and group inside
    #[arg(long, value_name = "ID", default_value = "65534", value_parser = clap::value_parser!(u32).range(1..))]
    user: u32,
    /// The huge pages of the machine
    #[arg(long, value_name = "SIZE", default_value = "2M")]
    page: Page,
    /// The resource under which Kubernetes knows the virtual functions
    #[arg(long, value_name = "NAME", default_value = "intel.com/sriov_vfio")]
    resource: String,
    #[command(flatten)]
    host: HostArgs,
    /// What to run inside; a check of the first port if nothing is given
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// A port spec, as it was typed and what it says.
#[derive(Clone, Debug)]
struct Port {
    text: String,
    spec: PortSpec,
}

impl std::str::FromStr for Port {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        Ok(Port {
            text: text.to_owned(),
            spec: text.parse()?,
        })
    }
}

/// Whose words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// All of them, each with a heading
    All,
    /// config.json of an OCI bundle, for crun, runc and youki
    Oci,
    /// A podman command line
    Podman,
    /// A docker command line
    Docker,
    /// A Kubernetes pod
    Pod,
    /// A specification of the Container Device Interface, for /etc/cdi
    Cdi,
}

impl Format {
    const EACH: [(Format, &'static str); 5] = [
        (Format::Oci, "OCI: config.json"),
        (Format::Podman, "podman"),
        (Format::Docker, "docker"),
        (Format::Pod, "Kubernetes: kubectl apply -f"),
        (Format::Cdi, "CDI: /etc/cdi/usernic.json"),
    ];
}

/// A command line, or a document.
enum Text {
    Line(Vec<String>),
    Document(Value),
}

impl Text {
    fn of(container: &Container, format: Format) -> Result<Self> {
        Ok(match format {
            Format::Oci => Text::Document(serde_json::to_value(oci::spec(container)?)?),
            Format::Podman => Text::Line(engine::podman(container)),
            Format::Docker => Text::Line(engine::docker(container)),
            Format::Pod => Text::Document(serde_json::to_value(pod::pod(container))?),
            Format::Cdi | Format::All => Text::Document(serde_json::to_value(cdi::spec(container))?),
        })
    }

    fn shown(&self) -> Result<String> {
        Ok(match self {
            Text::Line(words) => engine::line(words),
            Text::Document(value) => serde_json::to_string_pretty(value)?,
        })
    }

    fn json(self) -> Value {
        match self {
            Text::Line(words) => words.into(),
            Text::Document(value) => value,
        }
    }
}

/// Prints it.
pub fn run(args: Args, json: bool) -> Result<()> {
    let container = Container::of(&args)?;
    for note in &container.notes {
        crate::note!("note: {note}");
    }
    let mut out = crate::output::stdout();
    if args.format != Format::All {
        writeln!(out, "{}", Text::of(&container, args.format)?.shown()?)?;
        return Ok(());
    }
    if json {
        let mut all = serde_json::Map::new();
        all.insert("schema".into(), "usernic.container/1".into());
        for (format, _) in Format::EACH {
            let name = format.to_possible_value().map(|v| v.get_name().to_owned());
            all.insert(name.unwrap_or_default(), Text::of(&container, format)?.json());
        }
        writeln!(out, "{}", serde_json::to_string(&all)?)?;
        return Ok(());
    }
    for (format, heading) in Format::EACH {
        writeln!(out, "# {heading}\n{}\n", Text::of(&container, format)?.shown()?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
