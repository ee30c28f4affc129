//! Command lines of podman and docker. Their default seccomp profile stays: what a port needs is in it.

use super::model::Container;

/// `podman run ...`.
pub fn podman(container: &Container) -> Vec<String> {
    // Else there would be writable file systems on /tmp, /run and /var/tmp.
    common(container, "podman", &["--read-only-tmpfs=false"])
}

/// `docker run ...`.
pub fn docker(container: &Container) -> Vec<String> {
    common(container, "docker", &[])
}

fn common(container: &Container, engine: &str, own: &[&str]) -> Vec<String> {
    let user = container.user;
    let mut words: Vec<String> = [engine, "run", "--rm", "--read-only"].map(str::to_owned).to_vec();
    words.extend(own.iter().map(|word| (*word).to_owned()));
    words.push(format!("--name={}", container.name));
    words.push(format!("--user={user}:{user}"));
    words.push("--network=none".into());
    words.push("--cap-drop=ALL".into());
    words.push("--security-opt=no-new-privileges".into());
    if container.memlock > 0 {
        words.push(format!("--ulimit=memlock={0}:{0}", container.memlock));
    }
    for folder in &container.folders {
        let path = folder.path.display();
        let access = if folder.writable { "" } else { ",readonly" };
        words.push(format!("--mount=type=bind,source={path},target={path}{access}"));
    }
    // Neither can mount a hugetlbfs: that of the host.
    for at in container.huge.iter().flat_map(|huge| &huge.mounts) {
        let path = at.display();
        words.push(format!("--mount=type=bind,source={path},target={path}"));
    }
    for device in &container.devices {
        words.push(format!("--device={}", device.path.display()));
    }
    match &container.rootfs {
        Some(rootfs) if engine == "podman" => words.extend(["--rootfs".to_owned(), rootfs.display().to_string()]),
        _ => words.push(container.image.clone()),
    }
    words.extend(container.command.iter().cloned());
    words
}

/// The words for a POSIX shell.
pub fn line(words: &[String]) -> String {
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
