use super::*;

#[test]
fn handles_are_given_back_in_order_and_reused() {
    let mut ws = Workspace::new(&[Device::CPU], 64).unwrap();
    let a = ws.alloc(Device::CPU, 1, 16).unwrap();
    let mark = ws.mark();
    let b = ws.alloc(Device::CPU, 2, 10).unwrap();
    ws.release(&mark);
    assert_eq!(ws.alloc(Device::CPU, 2, 10).unwrap(), b);
    assert!(!a.overlaps(b));
}

#[test]
fn too_little_memory_is_an_error_with_the_numbers() {
    let mut ws = Workspace::new(&[Device::CPU], 16).unwrap();
    let error = ws.alloc(Device::CPU, 1, 17).unwrap_err();
    let device = Device::CPU;
    assert_eq!(
        error,
        WorkspaceError::Exhausted {
            device,
            capacity: 16,
            used: 0,
            wanted: 32
        }
    );
}

#[test]
fn what_no_memory_could_hold_is_refused() {
    let values = Workspace::values_for(usize::MAX, usize::MAX);
    assert!(Workspace::new(&[Device::CPU], values).is_err());
}

#[test]
#[should_panic(expected = "an output overlaps an input")]
fn writing_over_an_input_is_refused() {
    let mut ws = Workspace::new(&[Device::CPU], 64).unwrap();
    let a = ws.alloc(Device::CPU, 4, 4).unwrap();
    ws.views([a.row_range(1, 2)], [a.row_range(2, 1)]);
}

#[test]
fn copies_cross_devices() {
    let second: Device = "cpu:1".parse().unwrap();
    let mut ws = Workspace::new(&[Device::CPU, second], 32).unwrap();
    let a = ws.alloc(Device::CPU, 1, 3).unwrap();
    let b = ws.alloc(second, 1, 3).unwrap();
    ws.write(a).copy_from_slice(&[1.0, 2.0, 3.0]);
    ws.copy(a, b);
    assert_eq!(ws.read(b), [1.0, 2.0, 3.0]);
    let once = Transfers {
        count: 1,
        bytes: 12,
    };
    assert_eq!(
        ws.transfers(),
        &BTreeMap::from([((Device::CPU, second), once)])
    );
    assert_eq!(ws.moved(b, second), Ok(b));
    let back = ws.moved(b, Device::CPU).unwrap();
    assert_eq!(ws.read(back), [1.0, 2.0, 3.0]);
    assert_eq!(ws.transfers()[&(second, Device::CPU)], once);
}
