//! How the two programs are linked: one with nothing, the other as C programs are.

fn main() {
    for argument in ["-nostartfiles", "-nostdlib", "-nodefaultlibs", "-static"] {
        println!("cargo::rustc-link-arg-bin=freestanding={argument}");
    }
    println!("cargo::rustc-link-arg-bin=with-libc=-lc");
    println!("cargo::rerun-if-changed=build.rs");
}
