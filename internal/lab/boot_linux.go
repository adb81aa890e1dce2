package lab

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// A disk that boots by itself: the master boot record, then from 1 MiB on a
// FAT partition with the kernel, the initramfs and two loaders, syslinux for a
// BIOS and systemd-boot where UEFI looks without being told, then the ext4
// partition. All of it is made without a mount and without the host's own
// boot loader packages.
const (
	sectorBytes = 512
	bootStart   = 1 << 20
	bootBytes   = 47 << 20
)

const bootConfig = "DEFAULT lab\nPROMPT 0\nTIMEOUT 0\nLABEL lab\n  KERNEL vmlinuz\n  INITRD initrd.img\n  APPEND " + quickBoot + "\n"

const uefiConfig = "title lab\nlinux /vmlinuz\ninitrd /initrd.img\noptions " + quickBoot + "\n"

// makeBoot writes boot.img, the disk's first part, from the kernel and the
// initramfs in the same directory.
func (d *debSource) makeBoot(ctx context.Context, guest, tree string) error {
	for _, p := range []string{"syslinux", "syslinux-common", "systemd-boot-efi", "mtools", "dosfstools"} {
		if err := d.unpack(ctx, p, tree); err != nil {
			return err
		}
	}
	loader, err := os.ReadFile(filepath.Join(tree, "usr/lib/systemd/boot/efi/systemd-bootx64.efi"))
	if err != nil {
		return err
	}
	top := filepath.Join(tree, "partition")
	for name, data := range map[string][]byte{
		"syslinux.cfg": []byte(bootConfig), "EFI/BOOT/BOOTX64.EFI": loader,
		"loader/loader.conf": []byte("timeout 0\n"), "loader/entries/lab.conf": []byte(uefiConfig),
	} {
		file := filepath.Join(top, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, data, 0o644); err != nil {
			return err
		}
	}
	fat := filepath.Join(tree, "fat.img")
	if err := os.WriteFile(fat, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(fat, bootBytes); err != nil {
		return err
	}
	// syslinux runs mcopy and mattrib, which have to be found.
	env := append(os.Environ(), "PATH="+filepath.Join(tree, "usr/bin")+":"+os.Getenv("PATH"), "MTOOLS_SKIP_CHECK=1")
	for _, args := range [][]string{
		{"sbin/mkfs.fat", "-F", "16", "-h", fmt.Sprint(bootStart / sectorBytes), "-n", "LABBOOT", "-i", "1ab00001", fat},
		{"usr/bin/mcopy", "-s", "-i", fat, filepath.Join(guest, "vmlinuz"), filepath.Join(guest, "initrd.img"),
			filepath.Join(top, "syslinux.cfg"), filepath.Join(top, "EFI"), filepath.Join(top, "loader"), "::/"},
		{"usr/bin/syslinux", "--install", fat},
	} {
		program := filepath.Join(tree, args[0])
		if _, err := os.Stat(program); err != nil {
			program = filepath.Join(tree, "usr", args[0]) // later releases have no /sbin
		}
		cmd := exec.CommandContext(ctx, program, args[1:]...)
		cmd.Env = env
		if err := runQuiet(cmd); err != nil {
			return err
		}
	}
	record, err := os.ReadFile(filepath.Join(tree, "usr/lib/syslinux/mbr/mbr.bin"))
	if err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(guest, "boot.img"))
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := out.Write(record[:min(len(record), 440)]); err != nil {
		return err
	}
	data, err := os.ReadFile(fat)
	if err != nil {
		return err
	}
	if _, err := out.WriteAt(data, bootStart); err != nil {
		return err
	}
	return out.Close()
}

// writeBoot puts the boot part and the partition table on a disk of size bytes
// and says at which byte the second partition begins.
func writeBoot(disk, boot string, size int64) (int64, error) {
	const start = bootStart + bootBytes
	if size < start+16<<20 {
		return 0, fmt.Errorf("%d bytes are too few for a disk that boots", size)
	}
	in, err := os.Open(boot)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return 0, err
	}
	table := make([]byte, 4+2+2*16, sectorBytes-440)
	binary.LittleEndian.PutUint32(table, 0x1ab00001) // the disk's signature
	entry := func(n int, active, kind byte, from, length int64) {
		e := table[6+16*n:][:16]
		e[0], e[4] = active, kind
		// Sectors by number only: no BIOS of today reads cylinders.
		copy(e[1:4], "\xfe\xff\xff")
		copy(e[5:8], "\xfe\xff\xff")
		binary.LittleEndian.PutUint32(e[8:], uint32(from/sectorBytes))
		binary.LittleEndian.PutUint32(e[12:], uint32(length/sectorBytes))
	}
	entry(0, 0x80, 0x0e, bootStart, bootBytes)
	entry(1, 0, 0x83, start, size-start)
	table = table[:cap(table)]
	table[len(table)-2], table[len(table)-1] = 0x55, 0xaa
	if _, err := out.WriteAt(table, 440); err != nil {
		return 0, err
	}
	return start, out.Close()
}
