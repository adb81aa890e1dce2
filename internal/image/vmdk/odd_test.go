package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// What real programs and hands were seen to write, and what must come of it.
func TestOddDescriptors(t *testing.T) {
	const head = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
	first := bytes.Repeat([]byte{1}, 1024)
	second := bytes.Repeat([]byte{2}, 1024)
	for _, c := range []struct {
		name, text string
		want       string // a digit for each sector, from its bytes
	}{
		{"offset in sectors", head + "RW 1 FLAT \"a\" 1\nRW 2 FLAT \"b\" 0\n", "122"},
		{"VMFS without offset", head + "RW 2 VMFS \"a\"\n", "11"},
		{"longer file than extent", head + "RW 1 VMFS \"a\"\n", "1"},
		{"zeros between", head + "RW 1 FLAT \"a\" 0\nRW 2 ZERO\nRW 1 FLAT \"b\" 0\n", "1002"},
		{"tabs", head + "RW\t1\tFLAT\t\"a\"\t0\nRDONLY\t1\tFLAT\t\"b\"\t1\n", "12"},
		{"a name with blanks", head + "RW 1 FLAT \"a b = c.vmdk\" 0\n", "2"},
		{"a name without quotes", head + "RW 1 FLAT a 0\n", "1"},
		{"Windows line ends and blanks", strings.ReplaceAll(head, "\n", "  \r\n") + "RW 1 FLAT \"a\" 0 \r\n", "1"},
		{"blanks around every sign", strings.ReplaceAll(head, "=", " = ") + "RW 1 FLAT \"a\" 0\n", "1"},
		{"padded with NULs", head + "RW 1 FLAT \"a\" 0\n\x00\x00\x00", "1"},
		{"a byte order mark", "\xef\xbb\xbf" + head + "RW 1 FLAT \"a\" 0\n", "1"},
		{"another first line", "# by hand\n\n" + head[22:] + "RW 1 FLAT \"a\" 0\n", "1"},
		{"first line in lower case", strings.ToLower(head) + "RW 1 FLAT \"a\" 0\n", "1"},
		{"an unknown kind of disk", head + "createType=\"somethingNew\"\nRW 1 FLAT \"a\" 0\n", "1"},
		{"made by VirtualBox without a parent", head + "RW 1 FLAT \"a\" 0\nddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\n", "1"},
		{"version 3", strings.Replace(head, "version=1", "version=3", 1) + "changeTrackPath=\"x-ctk.vmdk\"\nRW 1 FLAT \"a\" 0\n", "1"},
		{"windows-1252 name kept as bytes", head + "encoding=\"windows-1252\"\nRW 1 FLAT \"m\xf6bel.vmdk\" 0\n", "1"},
		{"windows-1252 name in UTF-8 here", head + "encoding=\"windows-1252\"\nRW 1 FLAT \"\x80uro.vmdk\" 0\n", "2"},
		{"GBK name of a disk renamed on the way", head + "encoding=\"GBK\"\nRW 1 FLAT \"\xd0\xc2-flat.vmdk\" 0\n", "1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := &imagetest.Dir{Files: map[string][]byte{
				"a": first, "b": second, "a b = c.vmdk": second, "m\xf6bel.vmdk": first, "€uro.vmdk": second, "hostile-flat.vmdk": first,
			}}
			img, err := openBytes([]byte(c.text), dir)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			p := make([]byte, img.Size())
			if _, err := img.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
			got := ""
			for i := 0; i < len(p); i += 512 {
				got += string('0' + p[i])
			}
			if got != c.want {
				t.Errorf("reads as %s, want %s", got, c.want)
			}
		})
	}
}

// What cannot be read says what it is.
func TestRefusalsNameTheReason(t *testing.T) {
	const head = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
	for _, c := range []struct{ name, text, want string }{
		{"raw device mapping", head + "createType=\"vmfsPassthroughRawDeviceMap\"\nRW 8 VMFSRDM \"x-rdmp.vmdk\"\n", "raw device mapping"},
		{"device", head + "createType=\"fullDevice\"\nRW 8 FLAT \"/dev/sda\" 0\n", "physical device"},
		{"no access", head + "NOACCESS 8 FLAT \"a\" 0\n", "NOACCESS"},
		{"encrypted by Workstation", head + "encryption.keySafe=\"vmware:key/list/x\"\nRW 8 ZERO\n", "encrypted"},
		{"encrypted by vSphere", head + "encryptionKeys=\"vmware:key/list/x\"\nRW 8 VMFS \"a\"\nddb.iofilters = \"vmwarevmcrypt\"\n", "encrypted"},
		{"layer of VirtualBox", head + "RW 8 ZERO\nddb.uuid.parent=\"5e1b6f1a-0000-4000-8000-000000000001\"\n", "VirtualBox"},
		{"on vSAN", head + "RW 8 VMFS \"vsan://52d6-9a\"\n", "object"},
		{"change tracking file", "\xa2\x72\x19\xf6\x01\x00\x00\x00" + strings.Repeat("\x00", 504), "change tracking"},
	} {
		_, err := openBytes([]byte(c.text), &imagetest.Dir{})
		if !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	for _, c := range []struct{ name, text string }{
		{"access misspelt", head + "RW 1 ZERO\nRDWR 8 FLAT \"a\" 0\n"},
		{"access missing", head + "RW 1 ZERO\n = 8 FLAT \"a\" 0\n"},
	} {
		if _, err := openBytes([]byte(c.text), &imagetest.Dir{}); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: an extent is left out: %v", c.name, err)
		}
	}
}

// The change tracking file is shown and never opened.
func TestChangeTrackingFileIsShown(t *testing.T) {
	dir := &imagetest.Dir{Files: map[string][]byte{"a": make([]byte, 512), "x-ctk.vmdk": make([]byte, 512)}}
	text := "# Disk DescriptorFile\nversion=3\nCID=12345678\nparentCID=ffffffff\nRW 1 VMFS \"a\"\nchangeTrackPath=\"x-ctk.vmdk\"\n"
	img, err := openBytes([]byte(text), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if got := img.Info().FormatDetails["change tracking file"]; got != "x-ctk.vmdk" {
		t.Errorf("Info shows %q", got)
	}
	if len(dir.Asked) != 1 || dir.Asked[0] != "a" {
		t.Errorf("opened %q", dir.Asked)
	}
}

// A file that was cut says so.
func TestTruncationIsNamed(t *testing.T) {
	for _, variant := range []string{vmdk.MonolithicSparse, vmdk.StreamOptimized} {
		p := made(t, image.CreateOptions{Variant: variant})
		for _, n := range []int{600, len(p) / 2, len(p) - 2048} { // the last of a stream is behind its directory
			err := readsAll(p[:n:n], nil)
			if err == nil || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("%s cut at %d of %d: %v", variant, n, len(p), err)
			}
		}
	}
}

// An extent with room for a descriptor and none in it may be a whole disk or a
// piece of one.
func TestEmptyDescriptorWarns(t *testing.T) {
	p := made(t, image.CreateOptions{})
	clear(p[512 : 21*512])
	img, err := openBytes(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if w := img.Info().Warnings; len(w) != 1 {
		t.Errorf("warnings %q", w)
	}
}

// In a file with the flag for them, 1 stands for zeros, in a table and in a
// directory.
func TestZeroedTables(t *testing.T) {
	p := made(t, image.CreateOptions{})
	gd := int(binary.LittleEndian.Uint64(p[atGD:])) * 512
	put32(4, 2)(p)
	put32(atFlags, 5)(p)
	put32(gd, 1)(p)
	img, err := openBytes(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	buf := bytes.Repeat([]byte{9}, int(img.Size()))
	if _, err := img.ReadAt(buf, 0); err != nil || len(bytes.Trim(buf, "\x00")) > 0 {
		t.Errorf("a zeroed table reads as something else: %v", err)
	}
}

// The names of the extents of a real descriptor lead to files beside it, with
// whatever blanks are in them.
func TestExtentNamesWithBlanksOnDisk(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "Windows Server 2012 R2 (1).vmdk")
	text := "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 1 VMFS \"Windows Server 2012 R2 (1)-flat.vmdk\"\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(vmdk.FlatName(path), bytes.Repeat([]byte{7}, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	img, err := openPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	p := make([]byte, 512)
	if _, err := img.ReadAt(p, 0); err != nil || p[511] != 7 {
		t.Errorf("read %d, %v", p[511], err)
	}
}
