//! A Kubernetes pod.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, Container as K8sContainer, EmptyDirVolumeSource, HostPathVolumeSource, Pod, PodSecurityContext,
    PodSpec, ResourceRequirements, SeccompProfile, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::model::Container;

/// The pod. What Kubernetes cannot do: without a network of the cluster there is no pod.
pub fn pod(container: &Container) -> Pod {
    let (mut volumes, mut mounts) = (Vec::new(), Vec::new());
    for (number, folder) in container.folders.iter().enumerate() {
        let name = format!("port{number}");
        volumes.push(Volume {
            name: name.clone(),
            host_path: Some(HostPathVolumeSource {
                path: folder.path.display().to_string(),
                type_: Some("Directory".into()),
            }),
            ..Volume::default()
        });
        mounts.push(mount(name, folder.path.display().to_string(), !folder.writable));
    }
    for (number, at) in container.huge.iter().flat_map(|h| &h.mounts).enumerate() {
        let name = format!("hugepages{number}");
        let page = container.huge.as_ref().map_or("2Mi", |h| h.page.kubernetes());
        volumes.push(Volume {
            name: name.clone(),
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some(format!("HugePages-{page}")),
                ..EmptyDirVolumeSource::default()
            }),
            ..Volume::default()
        });
        mounts.push(mount(name, at.display().to_string(), false));
    }
    let user = i64::from(container.user);
    let spec = PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_user: Some(user),
            run_as_group: Some(user),
            run_as_non_root: Some(true),
            // A hugetlbfs of an emptyDir is root's; this gives it to the group.
            fs_group: container.huge.as_ref().filter(|h| !h.mounts.is_empty()).map(|_| user),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".into(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        containers: vec![K8sContainer {
            name: container.name.clone(),
            image: Some(container.image.clone()),
            command: Some(container.command.clone()),
            resources: Some(resources(container)),
            security_context: Some(SecurityContext {
                allow_privilege_escalation: Some(false),
                read_only_root_filesystem: Some(true),
                privileged: Some(false),
                capabilities: Some(Capabilities {
                    drop: Some(vec!["ALL".into()]),
                    ..Capabilities::default()
                }),
                ..SecurityContext::default()
            }),
            volume_mounts: Some(mounts).filter(|m| !m.is_empty()),
            ..K8sContainer::default()
        }],
        volumes: Some(volumes).filter(|v| !v.is_empty()),
        ..PodSpec::default()
    };
    Pod {
        metadata: ObjectMeta {
            name: Some(container.name.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        ..Pod::default()
    }
}

fn mount(name: String, path: String, read_only: bool) -> VolumeMount {
    VolumeMount {
        name,
        mount_path: path,
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}

/// Requests are equal to limits: huge pages and devices cannot be overcommitted, and a whole CPU, asked for so, can be
/// the pod's alone (static CPU manager policy).
fn resources(container: &Container) -> ResourceRequirements {
    let mut all = BTreeMap::new();
    all.insert("cpu".to_owned(), Quantity("1".into()));
    all.insert("memory".to_owned(), mebibytes(container.plain));
    if let Some(huge) = &container.huge {
        all.insert(format!("hugepages-{}", huge.page.kubernetes()), mebibytes(huge.bytes));
    }
    if let Some((name, count)) = &container.resource {
        all.insert(name.clone(), Quantity(count.to_string()));
    }
    ResourceRequirements {
        limits: Some(all.clone()),
        requests: Some(all),
        ..ResourceRequirements::default()
    }
}

fn mebibytes(bytes: usize) -> Quantity {
    Quantity(format!("{}Mi", bytes.div_ceil(1 << 20)))
}
