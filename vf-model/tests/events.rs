//! Interrupts, counters, resets, time.

mod common;

use std::time::Duration;

use common::{Driver, device, frame, two};
use vf_model::{Settings, Shared, Speed};

const OTHER: [u8; 6] = [0x02, 0xaa, 0, 0, 0, 0x09];

/// Receive of queue 0 on vector 1, transmit on vector 2, the mailbox on vector 0, all unmasked.
fn arm(driver: &Driver) {
    driver.write(0x120, 0x8281);
    driver.write(0x140, 0x80);
    driver.write(0x108, 7);
}

fn fired(device: &Shared, vf: usize) -> u32 {
    device.with(|nic| nic.take_interrupts(vf))
}

#[test]
fn each_event_has_its_vector() {
    let (device, mut a, mut b) = two(Settings::default());
    arm(&a);
    arm(&b);
    a.send(&frame(b.mac, a.mac, 60));
    assert_eq!((fired(&device, 0), fired(&device, 1)), (4, 2));
    assert_eq!((a.read(0x100), b.read(0x100)), (4, 2));
    assert_eq!(a.read(0x100), 0, "cleared by reading");
    device.with(|nic| nic.set_link(None));
    assert_eq!((fired(&device, 0), fired(&device, 1)), (1, 1));
    b.take_message();
    assert_eq!(fired(&device, 1), 0);
    b.write(0x2fc, 0x4);
    b.write(0x200, 0x10);
    b.write(0x2fc, 0x1);
    b.settle();
    assert_eq!(fired(&device, 1), 1, "the PF has read and answered");
}

#[test]
fn masked_vectors_are_silent_until_unmasked() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    arm(&driver);
    driver.write(0x10c, 7);
    driver.send(&frame(OTHER, driver.mac, 60));
    assert_eq!(fired(&device, 0), 0);
    assert_eq!(driver.read(0x108), 0);
    driver.write(0x108, 4);
    assert_eq!(fired(&device, 0), 4);
    driver.write(0x104, 6);
    assert_eq!(fired(&device, 0), 4, "VTEICS: vector 1 is masked still");
    driver.write(0x108, 2);
    assert_eq!(fired(&device, 0), 2);
}

#[test]
fn auto_mask_and_auto_clear_as_a_polling_driver_uses_them() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    driver.write(0x110, 7);
    driver.write(0x114, 7);
    arm(&driver);
    for _ in 0..3 {
        device.with(|nic| nic.inject(&frame(driver.mac, OTHER, 60)));
        driver.settle();
        assert_eq!(fired(&device, 0), 2);
        assert_eq!(driver.read(0x108), 5, "masked by itself");
        device.with(|nic| nic.inject(&frame(driver.mac, OTHER, 60)));
        driver.settle();
        assert_eq!(fired(&device, 0), 0, "while it polls");
        assert_eq!(std::iter::from_fn(|| driver.receive()).count(), 2);
        driver.write(0x108, 2);
        assert_eq!(fired(&device, 0), 2, "what came meanwhile is told");
        driver.write(0x108, 2);
        assert_eq!(fired(&device, 0), 0);
    }
}

#[test]
fn moderation_is_by_vector_and_by_time() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    arm(&driver);
    // 25 steps of 2 us on vector 2.
    driver.write(0x828, 200);
    assert_eq!(driver.read(0x828), 200);
    driver.send(&frame(OTHER, driver.mac, 60));
    assert_eq!(fired(&device, 0), 4);
    driver.send(&frame(OTHER, driver.mac, 60));
    assert_eq!(fired(&device, 0), 0);
    assert_eq!(device.with(|nic| nic.next_interrupt()), Some(Duration::from_micros(50)));
    device.with(|nic| nic.advance(Duration::from_micros(49)));
    assert_eq!(fired(&device, 0), 0);
    device.with(|nic| nic.advance(Duration::from_micros(1)));
    assert_eq!(fired(&device, 0), 4);
    assert_eq!(device.with(|nic| nic.next_interrupt()), None);
    assert_eq!(driver.read(0x48), 50, "VFFRTIMER in microseconds");
}

#[test]
fn counters_go_on_through_resets_and_wrap() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    device.with(|nic| {
        let counters = nic.counters(0);
        counters.packets_tx = u32::MAX;
        counters.octets_tx = 0xf_ffff_fff0;
        counters.packets_rx = u32::MAX;
        counters.octets_rx = 0xffff_fff0;
    });
    assert_eq!((driver.read(0x2020), driver.read(0x2024)), (0xffff_fff0, 0xf));
    driver.send(&frame(OTHER, driver.mac, 100));
    assert_eq!(driver.read(0x201c), 0, "32 bits");
    assert_eq!((driver.read(0x2020), driver.read(0x2024)), (84, 0), "36 bits");
    device.with(|nic| nic.inject(&frame(driver.mac, OTHER, 100)));
    device.with(|nic| nic.inject(&frame([0xff; 6], OTHER, 100)));
    driver.settle();
    assert_eq!(driver.read(0x101c), 1);
    assert_eq!((driver.read(0x1020), driver.read(0x1024)), (184, 1));
    assert_eq!(driver.read(0x1034), 0, "broadcast is no multicast");
    driver.restart();
    assert_eq!(driver.read(0x101c), 1, "not cleared by a reset, nor by reading");
    driver.ask(&[0x0001_0003, 0]);
    device.with(|nic| nic.inject(&frame([1, 0, 0x5e, 0, 0, 0], OTHER, 60)));
    driver.settle();
    assert_eq!(driver.read(0x1034), 1);
}

#[test]
fn a_reset_stops_queues_and_keeps_rings_and_hides_interrupts() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    arm(&driver);
    driver.reset();
    assert_eq!((driver.read(0x1028), driver.read(0x2028)), (0, 0));
    assert_eq!(driver.read(0x1008), 1024, "rings are the driver's business");
    assert_eq!((driver.read(0x108), driver.read(0x120), driver.read(0x140)), (0, 0, 0));
    assert!(!device.with(|nic| nic.policy(0).agreed().clear_to_send));
    device.with(|nic| nic.inject(&frame(driver.mac, OTHER, 60)));
    driver.settle();
    assert_eq!(device.with(|nic| nic.waiting(0)), 0);
}

#[test]
fn an_enabled_queue_shows_it_after_some_reads() {
    let device = device(Settings {
        latency: 3,
        ..Settings::default()
    });
    let driver = Driver::new(&device, 0);
    driver.write(0x2008, 1024);
    driver.write(0x2028, 1 << 25);
    let shown: Vec<bool> = (0..5).map(|_| driver.read(0x2028) & 1 << 25 != 0).collect();
    assert_eq!(shown, [false, false, false, true, true]);
    driver.write(0x2028, 1 << 26);
    let shown: Vec<u32> = (0..5).map(|_| driver.read(0x2028)).collect();
    assert_eq!(shown, [1 << 25, 1 << 25, 1 << 25, 0, 0], "SWFLSH clears itself");
}

#[test]
fn a_thousand_restarts() {
    let (device, mut a, mut b) = two(Settings::default());
    for i in 0..1000 {
        match i % 4 {
            0 => a.restart(),
            1 => b.restart(),
            2 => {
                device.with(|nic| {
                    nic.begin_reset();
                    nic.end_reset();
                });
                a.restart();
                b.restart();
            }
            _ => {
                device.with(|nic| nic.set_link(None));
                device.with(|nic| nic.set_link(Some(Speed::G10)));
            }
        }
        let bytes = frame(b.mac, a.mac, 60 + i % 1000);
        a.send(&bytes);
        assert_eq!(b.receive().unwrap().bytes, bytes);
    }
    assert!(device.with(|nic| nic.complaints(0).is_empty() && nic.complaints(1).is_empty()));
}
