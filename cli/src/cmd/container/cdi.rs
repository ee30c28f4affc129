//! The Container Device Interface: ports as devices that an engine adds by name, as in
//! `podman run --device usernic.github.io/port=port0`.
//!
//! The forms are those of its schema (container-device-interface, `SPEC.md`, version 0.5.0); no crate has them.

use serde::Serialize;

use super::model::{Container, Part};

/// The vendor and class of all.
const KIND: &str = "usernic.github.io/port";

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: Edits,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Edits {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device_nodes: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<Mount>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: String,
    permissions: &'static str,
    file_mode: u32,
    uid: u32,
    gid: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: String,
    container_path: String,
    options: Vec<&'static str>,
}

/// One device a port and a virtual function.
pub fn spec(container: &Container) -> Spec {
    Spec {
        cdi_version: "0.5.0",
        kind: KIND,
        devices: container
            .parts
            .iter()
            .map(|part| Device {
                name: part.name.clone(),
                container_edits: edits(part, container.user),
            })
            .collect(),
    }
}

fn edits(part: &Part, user: u32) -> Edits {
    Edits {
        device_nodes: part
            .devices
            .iter()
            .map(|device| Node {
                path: device.path.display().to_string(),
                permissions: "rw",
                file_mode: 0o600,
                uid: user,
                gid: user,
            })
            .collect(),
        mounts: part
            .folders
            .iter()
            .map(|folder| Mount {
                host_path: folder.path.display().to_string(),
                container_path: folder.path.display().to_string(),
                options: vec![
                    "bind",
                    "nosuid",
                    "nodev",
                    "noexec",
                    if folder.writable { "rw" } else { "ro" },
                ],
            })
            .collect(),
    }
}
