//! What needs no privilege and no huge page. The rest is in the tests across crates.

use hugemem::PageSize;

use super::{Automatic, Error, Limit, MemorySource, Request};
use crate::spec::{MemoryKind, PortSpec};

const REQUEST: Request<'static> = Request {
    len: 300_000,
    name: "test",
    numa: None,
};

/// A root on which the kernel says that so many huge pages are free.
fn root(free: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let pool = root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB");
    std::fs::create_dir_all(&pool).unwrap();
    std::fs::write(pool.join("free_hugepages"), free).unwrap();
    root
}

#[test]
fn without_free_pages_auto_takes_plain_ones_and_says_why() {
    let root = root("0\n");
    let allocation = Automatic::default().root(root.path()).allocate(&REQUEST).unwrap();
    assert_eq!(allocation.segment.page_size(), PageSize::BASE);
    assert!(allocation.segment.len() >= REQUEST.len && allocation.segment.len() < REQUEST.len + 4096 * 16);
    assert_eq!(
        allocation.choice.to_string(),
        format!(
            "memfd, {} pages (the kernel has 0 free huge pages of 2 MiB, 1 needed: add 1 to \
             /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages)",
            PageSize::BASE
        )
    );
}

#[test]
fn plain_pages_beyond_a_limit_are_an_error_and_not_the_end_of_the_process() {
    let root = root("0\n");
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("proc/self/cgroup", "0::/\n");
    write(
        "proc/self/mountinfo",
        "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    );
    write("sys/fs/cgroup/memory.max", "409600\n");
    write("sys/fs/cgroup/memory.current", "200000\n");
    let ask = |kind| Automatic::new(kind).root(root.path()).allocate(&REQUEST);
    for kind in [MemoryKind::Auto, MemoryKind::Memfd] {
        let error = ask(kind).unwrap_err().to_string();
        assert!(
            error.contains("sys/fs/cgroup/memory.max allows 51 more pages of 4 KiB, 74 needed"),
            "{error}"
        );
        assert!(error.contains("raise it (a container's memory limit)"), "{error}");
    }
    write("sys/fs/cgroup/memory.current", "0\n");
    ask(MemoryKind::Memfd).unwrap();
    write("proc/meminfo", "MemAvailable: 200 kB\n");
    let error = ask(MemoryKind::Memfd).unwrap_err().to_string();
    assert!(
        error.contains("the machine has 50 available pages of 4 KiB, 74 needed"),
        "{error}"
    );
}

#[test]
fn auto_survives_a_kernel_that_says_too_much() {
    // More than any machine has: the attempt fails for lack of pages that the root claims to be there.
    let root = root("1000000000\n");
    let request = Request {
        len: 1 << 44,
        ..REQUEST
    };
    let error = Automatic::new(MemoryKind::MemfdHuge)
        .root(root.path())
        .allocate(&request)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Shortage {
                limit: Limit::Memory { .. },
                needed: 8_388_608,
                ..
            } | Error::NoHugePages { .. }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("pass memory=memfd"), "{error}");
}

#[test]
fn a_directory_elsewhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [MemoryKind::Auto, MemoryKind::Hugetlbfs] {
        let error = Automatic::new(kind)
            .huge_dir(dir.path())
            .allocate(&REQUEST)
            .unwrap_err();
        assert!(
            matches!(&error, Error::NotHugetlbfs { path } if path == dir.path()),
            "{error}"
        );
    }
    let error = Automatic::new(MemoryKind::Hugetlbfs)
        .huge_dir("/nowhere")
        .allocate(&REQUEST)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("hugetlbfs at /nowhere: no file can be made there: No such file"),
        "{error}"
    );
}

#[test]
fn without_a_mount_hugetlbfs_does_not_fall_back() {
    let root = root("0\n");
    let error = Automatic::new(MemoryKind::Hugetlbfs)
        .root(root.path())
        .allocate(&REQUEST)
        .unwrap_err();
    assert!(matches!(error, Error::NoMount), "{error}");
}

#[test]
fn a_memfd_in_a_directory_is_a_contradiction() {
    let spec: PortSpec = "virtio-user,path=/s,memory=memfd,huge_dir=/dev/hugepages"
        .parse()
        .unwrap();
    let error = Automatic::from_spec(&spec).allocate(&REQUEST).unwrap_err();
    assert!(matches!(error, Error::Contradiction { kind: "memfd" }), "{error}");
}

#[test]
fn a_node_that_is_not_there_is_an_error() {
    for kind in [MemoryKind::Auto, MemoryKind::Memfd] {
        let root = root("0\n");
        let request = Request {
            numa: Some(1000),
            ..REQUEST
        };
        let error = Automatic::new(kind).root(root.path()).allocate(&request).unwrap_err();
        assert!(matches!(error, Error::Numa { node: 1000, .. }), "{error}");
        assert!(error.to_string().contains("leave numa= out"), "{error}");
    }
}

#[test]
fn names_are_cut_and_cleaned() {
    let name = "a\0b".repeat(200);
    let allocation = Automatic::new(MemoryKind::Memfd)
        .allocate(&Request { name: &name, ..REQUEST })
        .unwrap();
    assert!(allocation.segment.fd().is_some());
}
