// Package lab builds a small Linux guest from Debian packages and runs it
// under libvirt, for the demo and for tests.
//
// The guest is a real one: Debian's cloud kernel, busybox, the QEMU guest
// agent with its freeze hook, an ext4 disk, and a workload that writes records
// which prove themselves. Each time it boots, the guest first checks what it
// finds on its disk and prints one line that starts with "WORKLOAD VERIFY" on
// the serial port, and only then goes on writing. So a disk that was restored
// speaks for itself.
//
//	guest, err := lab.Build(ctx, "", lab.BuildOptions{})       // cached
//	lv, err := lab.StartLibvirt(ctx, dir, lab.LibvirtOptions{}) // lv.URI()
//	defer lv.Stop()
//	err = guest.CreateDisk(ctx, lv.Path("vda.qcow2"), lab.DiskOptions{})
//	vm, err := lv.Define(ctx, guest, lab.VMOptions{Name: "web01", Disks: []lab.VMDisk{{Path: lv.Path("vda.qcow2")}}})
//	err = vm.Start(ctx)
//	err = vm.WaitAgent(ctx)
//	out, err := vm.AgentExec(ctx, "cat", "/run/verify.txt")
//
// # The private libvirt
//
// StartLibvirt runs a libvirtd of its own in a mount namespace of its own, in
// which /etc/libvirt, /run/libvirt, /var/cache/libvirt, /var/log/libvirt and
// /var/lib/libvirt/qemu, but for the NVRAM files in it, are directories below
// the lab's. It needs root, but no systemd and no D-Bus,
// and it neither sees nor disturbs a libvirtd that the machine runs already.
// All other paths are the machine's: a program outside the namespace and QEMU
// inside mean the same file by the same name. QEMU runs as libvirt-qemu, as it
// does on a host of Debian's.
//
// Whatever the lab started ends with it, also when the process that started it
// is killed: a keeper process waits for the end of a pipe.
//
// Everything but this comment is for linux/amd64.
package lab
