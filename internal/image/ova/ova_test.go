package ova_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/ova"
	"github.com/backstay/backstay/internal/image/raw"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// openMember opens the disks that these tests put into archives: VMDKs and,
// under any other name, raw bytes.
func openMember(f image.File, format image.Format) (image.Image, error) {
	if format != image.VMDK {
		return raw.Open(f), nil
	}
	d, err := vmdk.Open(f, image.OpenOptions{})
	if err != nil {
		return nil, err
	}
	return d, nil
}

func openFile(f image.File, disk string) (image.Image, error) {
	d, err := ova.Open(f, disk, openMember)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func openPath(path string) (image.Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	img, err := openFile(f, "")
	if err != nil {
		f.Close()
	}
	return img, err
}

func TestWriterRoundTrip(t *testing.T) {
	imagetest.Writer(t, imagetest.WriterTest{
		Create: ova.Create, Open: openPath, Ext: ".ova", SizeUnit: 64 << 10,
		Variants: []image.CreateOptions{{}, {Level: 1}},
	})
}

// written makes an appliance of disk and gives its path.
func written(t testing.TB, name string, disk *imagetest.Disk) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	w, err := ova.Create(path, image.CreateOptions{VirtualBytes: disk.Size()})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p := make([]byte, disk.Size())
	if _, err := disk.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return path
}

// The order of the files and the sums in the manifest are what importers
// check first.
func TestArchiveAndManifest(t *testing.T) {
	disk := imagetest.NewDisk(3, 5<<20)
	for _, c := range []struct{ file, inner string }{
		{"web01.ova", "web01"}, {"web 01 ü.ova", "appliance"}, {strings.Repeat("x", 120) + ".ova", "appliance"},
	} {
		path := written(t, c.file, disk)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		sums := map[string]string{}
		var names []string
		var manifest string
		for r := tar.NewReader(f); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			p, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, h.Name)
			sums[h.Name] = fmt.Sprintf("SHA256(%s)= %x", h.Name, sha256.Sum256(p))
			switch filepath.Ext(h.Name) {
			case ".mf":
				manifest = string(p)
			case ".ovf":
				checkDescriptor(t, p, c.inner+"-disk1.vmdk")
			}
		}
		want := []string{c.inner + ".ovf", c.inner + ".mf", c.inner + "-disk1.vmdk"}
		if fmt.Sprint(names) != fmt.Sprint(want) {
			t.Errorf("%s holds %v, want %v", c.file, names, want)
		}
		if manifest != sums[want[0]]+"\n"+sums[want[2]]+"\n" {
			t.Errorf("the manifest says\n%swant\n%v", manifest, sums)
		}
	}
}

func checkDescriptor(t *testing.T, p []byte, file string) {
	t.Helper()
	for d := xml.NewDecoder(bytes.NewReader(p)); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("no XML: %v\n%s", err, p)
		}
	}
	for _, part := range []string{
		`ovf:href="` + file + `"`, `ovf:capacity="5242880"`,
		`ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"`,
		`<rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>`,
	} {
		if !bytes.Contains(p, []byte(part)) {
			t.Errorf("the descriptor lacks %s:\n%s", part, p)
		}
	}
}

// What tar unpacks is a VMDK to QEMU with the disk's bytes, and its sum is the
// manifest's to sha256sum.
func TestOthersUnpackWhatWeWrite(t *testing.T) {
	disk := imagetest.NewDisk(4, 20<<20)
	path := written(t, "web01.ova", disk)
	dir := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(imagetest.Tool(t, name), args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	run("tar", "-xf", path)
	manifest, err := os.ReadFile(filepath.Join(dir, "web01.mf"))
	if err != nil {
		t.Fatal(err)
	}
	// sha256sum reads the manifest's form as its own "--tag" with other blanks.
	tagged := strings.NewReplacer("SHA256(", "SHA256 (", ")= ", ") = ").Replace(string(manifest))
	if err := os.WriteFile(filepath.Join(dir, "sums"), []byte(tagged), 0o600); err != nil {
		t.Fatal(err)
	}
	run("sha256sum", "-c", "--strict", "sums")
	imagetest.QemuCompare(t, disk.Save(t), "raw", filepath.Join(dir, "web01-disk1.vmdk"), "vmdk")
	run(imagetest.Tool(t, "xmllint"), "--noout", "web01.ovf")
}

func TestSevenZipListsWhatWeWrite(t *testing.T) {
	path := written(t, "web01.ova", imagetest.NewDisk(4, 1<<20))
	out, err := exec.Command(imagetest.Tool(t, "7z"), "t", "-ttar", path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Everything is Ok") || strings.Contains(string(out), "Warning") {
		t.Errorf("7z: %v\n%s", err, out)
	}
}

// An entry of an archive that a test makes.
type entry struct {
	name string
	data []byte
	kind byte
}

func archive(t testing.TB, format tar.Format, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Size: int64(len(e.data)), Mode: 0o600, Typeflag: e.kind, Format: format}
		if e.kind == tar.TypeSymlink {
			h.Linkname, h.Size = string(e.data), 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(e.data); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const twoDisks = `<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
<References><File ovf:id="f1" ovf:href="a%20b.raw"/><File ovf:id="f2" ovf:href="second.raw"/></References>
<DiskSection><Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^9" ovf:format="http://example.com/vhd"/>
<Disk ovf:diskId="empty" ovf:capacity="100"/>
<Disk ovf:diskId="d2" ovf:fileRef="f2" ovf:capacity="7" ovf:format="http://example.com/vhd"/></DiskSection>
<VirtualSystem ovf:id="pair"><Name>a pair</Name></VirtualSystem></Envelope>`

func TestChoosingADisk(t *testing.T) {
	one, two := bytes.Repeat([]byte{1}, 512), bytes.Repeat([]byte{2}, 1024)
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatGNU, tar.FormatPAX} {
		p := archive(t, format, entry{"./pair.ovf", []byte(twoDisks), tar.TypeReg}, entry{"a b.raw", one, tar.TypeReg}, entry{"second.raw", two, tar.TypeReg})
		if _, err := openFile(imagetest.Bytes("pair.ova", p), ""); !errors.Is(err, ova.ErrWhichDisk) || !strings.Contains(err.Error(), "2 (second.raw)") {
			t.Errorf("no choice: %v", err)
		}
		if _, err := openFile(imagetest.Bytes("pair.ova", p), "3"); !errors.Is(err, ova.ErrWhichDisk) {
			t.Errorf("a disk that is not there: %v", err)
		}
		for which, want := range map[string]byte{"1": 1, "d1": 1, "2": 2, "d2": 2, "second.raw": 2} {
			img, err := openFile(imagetest.Bytes("pair.ova", p), which)
			if err != nil {
				t.Fatalf("%s: %v", which, err)
			}
			b := make([]byte, 512)
			if _, err := img.ReadAt(b, 0); err != nil || b[0] != want || b[511] != want {
				t.Errorf("disk %s reads as %d, %v", which, b[0], err)
			}
			info := img.Info()
			if info.Format != image.OVA || info.FormatDetails["system"] != "a pair" || (want == 2) != (len(info.Warnings) == 1) {
				t.Errorf("disk %s: %+v", which, info)
			}
			img.Close()
		}
	}
}

// An appliance comes from strangers. It opens no file but itself, and what is
// wrong with it is told.
func TestHostileArchives(t *testing.T) {
	one := bytes.Repeat([]byte{1}, 512)
	single := func(href, more string) entry {
		return entry{"x.ovf", []byte(`<Envelope><References><File id="f" href="` + href + `"` + more + `/></References><DiskSection><Disk diskId="d" fileRef="f" capacity="512" format="vhd"/></DiskSection></Envelope>`), tar.TypeReg}
	}
	disk := entry{"x.raw", one, tar.TypeReg}
	good := archive(t, tar.FormatUSTAR, single("x.raw", ""), disk)
	desc := []byte("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\nRW 1 FLAT \"ova_test.go\" 0\n")
	for _, c := range []struct {
		name string
		p    []byte
		want error
	}{
		{"nothing wrong", good, nil},
		{"no bytes", nil, fault.ErrCorrupt},
		{"no archive", bytes.Repeat([]byte("x"), 5000), fault.ErrCorrupt},
		{"cut in the disk", good[:len(good)-1024-300], fault.ErrCorrupt},
		{"cut in a header", good[:1024+700], fault.ErrCorrupt},
		{"no descriptor", archive(t, tar.FormatUSTAR, disk), fault.ErrCorrupt},
		{"a descriptor that is no XML", archive(t, tar.FormatUSTAR, entry{"x.ovf", one, tar.TypeReg}, disk), fault.ErrCorrupt},
		{"a descriptor without end", archive(t, tar.FormatUSTAR, entry{"x.ovf", []byte(strings.Repeat("<a>", 100000)), tar.TypeReg}, disk), fault.ErrCorrupt},
		{"a descriptor of entities", archive(t, tar.FormatUSTAR, entry{"x.ovf", []byte(`<!DOCTYPE a [<!ENTITY b "bbbb">]><Envelope>&b;</Envelope>`), tar.TypeReg}, disk), fault.ErrCorrupt},
		{"a descriptor in EBCDIC", archive(t, tar.FormatUSTAR, entry{"x.ovf", []byte(`<?xml version="1.0" encoding="ebcdic"?><Envelope/>`), tar.TypeReg}, disk), fault.ErrUnsupported},
		{"a descriptor in Latin-1", archive(t, tar.FormatUSTAR, entry{"x.ovf", append([]byte(`<?xml version="1.0" encoding="ISO-8859-1"?>`+"<!-- \xfc -->"), single("x.raw", "").data...), tar.TypeReg}, disk), nil},
		{"no disk", archive(t, tar.FormatUSTAR, entry{"x.ovf", []byte("<Envelope/>"), tar.TypeReg}), fault.ErrNotFound},
		{"a disk that is not in the archive", archive(t, tar.FormatUSTAR, single("y.raw", ""), disk), fault.ErrCorrupt},
		{"a disk beside the archive", archive(t, tar.FormatUSTAR, single("ova_test.go", "")), fault.ErrCorrupt},
		{"a disk upwards", archive(t, tar.FormatUSTAR, single("../../../etc/passwd", "")), fault.ErrCorrupt},
		{"a disk on the network", archive(t, tar.FormatUSTAR, single("http://127.0.0.1/x", ""), disk), image.ErrNotAllowed},
		{"a disk that is a link", archive(t, tar.FormatUSTAR, single("x.raw", ""), entry{"x.raw", []byte("/etc/passwd"), tar.TypeSymlink}), fault.ErrCorrupt},
		{"a compressed disk", archive(t, tar.FormatUSTAR, single("x.raw", ` compression="gzip"`), disk), fault.ErrUnsupported},
		{"a disk in chunks", archive(t, tar.FormatUSTAR, single("x.raw", ` chunkSize="100"`), disk), fault.ErrUnsupported},
		{"a VMDK that names a file beside the archive", archive(t, tar.FormatUSTAR, entry{"x.ovf", bytes.ReplaceAll(single("x.raw", "").data, []byte("vhd"), []byte("vmdk")), tar.TypeReg}, entry{"x.raw", desc, tar.TypeReg}), image.ErrNotAllowed},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := imagetest.Hostile(t, func() (image.Image, error) { return openFile(imagetest.Bytes("x.ova", c.p), "") })
			if c.want == nil && err != nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("it gives %v, want %v", err, c.want)
			}
		})
	}
}

// Archives come from strangers. Whatever the bytes say, Open must not panic,
// loop, or allocate more than the file could justify.
func FuzzOpen(f *testing.F) {
	p, err := os.ReadFile(written(f, "x.ova", imagetest.NewDisk(1, 100)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Add(archive(f, tar.FormatGNU, entry{"pair.ovf", []byte(twoDisks), tar.TypeReg}, entry{"second.raw", make([]byte, 100), tar.TypeReg}))
	f.Add(archive(f, tar.FormatPAX, entry{"ü.ovf", []byte(twoDisks), tar.TypeReg}, entry{"a b.raw", make([]byte, 100), tar.TypeReg}))
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, which := range []string{"", "1"} {
			img, err := openFile(imagetest.Bytes("fuzz.ova", p), which)
			if err != nil {
				continue
			}
			img.Info()
			img.ReadAt(make([]byte, 1000), 0)
			img.Close()
		}
	})
}
