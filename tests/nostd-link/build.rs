//! How the two programs are linked.

fn main() {
    // With nothing: no start files, no C library.
    for argument in ["-nostartfiles", "-nostdlib", "-nodefaultlibs", "-static"] {
        println!("cargo::rustc-link-arg-bin=freestanding={argument}");
    }
    // With the C library alone; its own code refers to the compiler's unwinder.
    for argument in ["-Wl,--start-group", "-lc", "-lgcc_eh", "-lgcc", "-Wl,--end-group"] {
        println!("cargo::rustc-link-arg-bin=with-libc={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
