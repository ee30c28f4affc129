//! A kernel's modules: which files, in which order.
//!
//! An unpacked kernel package has no `modules.dep` (depmod writes it when the package is installed), so what a module
//! needs is read from the module itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

/// The modules of one kernel.
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Those below `folder`, the one with the kernel's version as its name.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut modules = Modules {
            files: BTreeMap::new(),
            builtin: BTreeSet::new(),
        };
        let builtin = folder.join("modules.builtin");
        let text = fs::read_to_string(&builtin).with_context(|| builtin.display().to_string())?;
        modules
            .builtin
            .extend(text.lines().filter_map(|l| name_of(Path::new(l))));
        modules.walk(&folder.join("kernel"))?;
        Ok(modules)
    }

    fn walk(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.walk(&entry.path())?;
            } else if let Some(name) = name_of(&entry.path()) {
                self.files.insert(name, entry.path());
            }
        }
        Ok(())
    }

    /// The modules of these names and all that they need, each behind what it needs: name and contents, not
    /// compressed. What the kernel has built in is left out.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut all = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.add(&normal(name), &mut seen, &mut all)?;
        }
        Ok(all)
    }

    fn add(&self, name: &str, seen: &mut BTreeSet<String>, all: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if !seen.insert(name.to_owned()) || self.builtin.contains(name) {
            return Ok(());
        }
        let path = self
            .files
            .get(name)
            .with_context(|| format!("this kernel has no module {name}"))?;
        let bytes = read(path)?;
        for needed in depends(&bytes).with_context(|| path.display().to_string())? {
            self.add(&needed, seen, all)?;
        }
        all.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// The kernel takes - and _ in a module's name for the same.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The module's name, if the file is a module.
fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    [".ko", ".ko.xz"]
        .iter()
        .find_map(|end| name.strip_suffix(end))
        .map(normal)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    if path.extension().is_some_and(|e| e == "xz") {
        let mut plain = Vec::new();
        if let Err(e) = lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut plain) {
            bail!("{}: {e:?}", path.display());
        }
        return Ok(plain);
    }
    Ok(bytes)
}

/// What a module says that it depends on: `depends=a,b` among the strings of its section `.modinfo`.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file
        .section_by_name(".modinfo")
        .context("no section .modinfo: not a module")?;
    let strings = section.data()?.split(|&b| b == 0);
    let list = strings
        .filter_map(|s| std::str::from_utf8(s).ok()?.strip_prefix("depends="))
        .next();
    let names = list.unwrap_or_default().split(',').filter(|n| !n.is_empty());
    Ok(names.map(normal).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A relocatable file whose one section is `.modinfo`.
    fn module(info: &[u8]) -> Vec<u8> {
        use object::write::Object;
        let (format, arch) = (object::BinaryFormat::Elf, object::Architecture::X86_64);
        let mut file = Object::new(format, arch, object::Endianness::Little);
        let section = file.add_section(Vec::new(), b".modinfo".to_vec(), object::SectionKind::ReadOnlyData);
        file.append_section_data(section, info, 1);
        file.write().unwrap()
    }

    #[test]
    fn modules_come_behind_what_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let drivers = dir.path().join("kernel/drivers");
        fs::create_dir_all(drivers.join("net")).unwrap();
        fs::write(
            dir.path().join("modules.builtin"),
            "kernel/drivers/virtio/virtio-ring.ko\n",
        )
        .unwrap();
        let write = |name: &str, info: &[u8]| fs::write(drivers.join(name), module(info)).unwrap();
        write("net/virtio_net.ko", b"license=GPL\0depends=net-failover,virtio_ring\0");
        write("net_failover.ko", b"depends=failover\0");
        write("failover.ko", b"depends=\0name=failover\0");
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut module(b"depends=failover\0").as_slice(), &mut packed).unwrap();
        fs::write(drivers.join("other.ko.xz"), packed).unwrap();
        fs::write(drivers.join("broken.ko"), "no ELF").unwrap();

        let modules = Modules::new(dir.path()).unwrap();
        let names = |wanted: &[&str]| -> Vec<String> {
            modules
                .closure(wanted)
                .unwrap()
                .into_iter()
                .map(|(name, _)| name)
                .collect()
        };
        assert_eq!(
            names(&["virtio-net", "other"]),
            ["failover", "net_failover", "virtio_net", "other"]
        );
        assert_eq!(names(&["virtio_ring"]), [""; 0]);
        assert!(modules.closure(&["absent"]).is_err());
        assert!(modules.closure(&["broken"]).is_err());
    }
}
