package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// nameFeatures puts a table of feature names behind the header of made.
func nameFeatures(p []byte, names map[feature]string) []byte {
	u32(p, 112, extFeatureNames)
	u32(p, 116, uint32(48*len(names)))
	at := 120
	for f, name := range names {
		clear(p[at : at+48])
		p[at], p[at+1] = f.group, f.bit
		copy(p[at+2:at+48], name)
		at += 48
	}
	clear(p[at : at+8])
	return p
}

// Who meets an image of next year's QEMU wants to know what it is that we lack.
func TestUnknownFeaturesAreNamed(t *testing.T) {
	p := nameFeatures(made(t, image.CreateOptions{}), map[feature]string{
		{featureIncompatible, 40}: "quantum clusters",
		{featureAutoclear, 5}:     "warm cache",
	})
	u64(p, 88, 1<<5|1<<6)
	img, err := Open(imagetest.Bytes("odd", p), image.OpenOptions{})
	if err != nil {
		t.Fatalf("unknown autoclear features do not matter to readers: %v", err)
	}
	if got := img.Info().FormatDetails["unknown_autoclear"]; got != `features "warm cache" (bit 5), bit 6` {
		t.Errorf("autoclear features: %s", got)
	}
	u64(p, 72, 1<<40|1<<41)
	_, err = Open(imagetest.Bytes("new", p), image.OpenOptions{})
	if !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), `"quantum clusters" (bit 40), bit 41`) {
		t.Errorf("error: %v", err)
	}
}

func TestEncryptedIsSaidSo(t *testing.T) {
	for method, word := range map[uint32]string{1: "AES", 2: "LUKS"} {
		p := made(t, image.CreateOptions{})
		u32(p, 32, method)
		_, err := Open(imagetest.Bytes("secret", p), image.OpenOptions{})
		if !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), "encrypted with "+word) {
			t.Errorf("method %d: %v", method, err)
		}
	}
}

func TestInfoOfSnapshotsAndBitmaps(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	imagetest.Qemu(t, "create", "-f", "qcow2", path, "4M")
	imagetest.Qemu(t, "snapshot", "-c", "small", path)
	imagetest.Qemu(t, "resize", path, "6M")
	imagetest.Qemu(t, "snapshot", "-c", "large", path)
	imagetest.Qemu(t, "bitmap", "--add", "-g", "128k", path, "on")
	imagetest.Qemu(t, "bitmap", "--add", "--disable", path, "off")
	info := mustOpen(t, path).Info()
	if len(info.SnapshotInfo) != 2 || len(info.BitmapInfo) != 2 {
		t.Fatalf("%+v", info)
	}
	for i, want := range []image.SnapshotInfo{{ID: "1", Name: "small", VirtualBytes: 4 << 20}, {ID: "2", Name: "large", VirtualBytes: 6 << 20}} {
		got := info.SnapshotInfo[i]
		if age := time.Since(got.Made); age < -time.Minute || age > time.Hour {
			t.Errorf("snapshot made %v", got.Made)
		}
		got.Made = time.Time{}
		if got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	for i, want := range []image.BitmapInfo{{Name: "on", Granularity: 128 << 10, Recording: true, Trusted: true}, {Name: "off", Granularity: 64 << 10, Trusted: true}} {
		if got := info.BitmapInfo[i]; got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
}

// Snapshots of version 2 do not say how large the disk was, and their L1 table
// is as long as it had to be then.
func TestOldSnapshotOfADiskThatGrew(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	// An L2 table of a cluster of 512 bytes maps 32 KiB.
	imagetest.Qemu(t, "create", "-f", "qcow2", "-o", "compat=0.10,cluster_size=512", path, "64k")
	qemuIO(t, path, "write -P 7 0 64k")
	imagetest.Qemu(t, "snapshot", "-c", "s", path)
	p := fileBytes(t, path)
	at := int(binary.BigEndian.Uint64(p[64:])) // the snapshot table
	extra := int(binary.BigEndian.Uint32(p[at+36:]))
	if extra < 16 {
		t.Fatalf("%d bytes of extra data", extra)
	}
	// As it was before there was any: the name follows at once.
	name := bytes.Clone(p[at+40+extra : at+40+extra+2])
	u32(p, at+36, 0)
	copy(p[at+40:], name)
	// The disk has grown since.
	u64(p, 24, 1<<20)
	l1 := int(binary.BigEndian.Uint64(p[40:]))
	u32(p, 36, 32)
	p = append(p, make([]byte, 512-len(p)%512)...)
	u64(p, 40, uint64(len(p)))
	p = append(append(p, p[l1:l1+16]...), make([]byte, 512-16)...)

	if img, err := Open(imagetest.Bytes("grown", p), image.OpenOptions{}); err != nil || img.Size() != 1<<20 || len(img.Snapshots()) != 1 {
		t.Fatalf("%+v, %v", img, err)
	}
	img, err := Open(imagetest.Bytes("grown", p), image.OpenOptions{Snapshot: "s"})
	if err != nil {
		t.Fatal(err)
	}
	if img.Size() != 64<<10 {
		t.Errorf("the snapshot has %d bytes", img.Size())
	}
	imagetest.Reader(t, img, bytes.NewReader(bytes.Repeat([]byte{7}, 64<<10)))
}

// wrapped hides the methods that not every Image has.
type wrapped struct{ image.Image }

func (w wrapped) Unwrap() image.Image { return w.Image }

func TestChangedThroughAWrapper(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	imagetest.Qemu(t, "create", "-f", "qcow2", path, "4M")
	imagetest.Qemu(t, "bitmap", "--add", path, "b")
	qemuIO(t, path, "write -P 1 1M 64k")
	imagetest.Qemu(t, "snapshot", "-c", "s", path)
	changed := func(img image.Image) (list []extent.Extent, err error) {
		for e, err := range image.Changed(context.Background(), img, "b") {
			if err != nil {
				return nil, err
			}
			list = append(list, e)
		}
		return list, nil
	}
	img := mustOpen(t, path)
	if list, err := changed(wrapped{img}); err != nil || len(list) != 1 || list[0] != (extent.Extent{Off: 1 << 20, Len: 64 << 10}) {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := changed(struct{ image.Image }{img}); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("an image without records: %v", err)
	}
	snapshot, err := openPath(path, image.OpenOptions{Snapshot: "s"})
	if err != nil {
		t.Fatal(err)
	}
	defer snapshot.Close()
	if _, err := changed(snapshot); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("a snapshot, which the bitmap is not about: %v", err)
	}
}

// Who only asks what an image is needs no data file; who reads it does.
func TestOnlyTopWithoutItsDataFile(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	imagetest.Qemu(t, "create", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), path, "4M")
	qemuIO(t, path, "write -P 1 0 64k", "write -z 1M 64k")
	img, err := Open(imagetest.Bytes("disk", fileBytes(t, path)), image.OpenOptions{OnlyTop: true})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if w := img.Info().Warnings; len(w) != 1 || !strings.Contains(w[0], "data file") {
		t.Errorf("warnings %q", w)
	}
	if _, err := img.ReadAt(make([]byte, 512), 0); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("data without the data file: %v", err)
	}
	if _, err := img.ReadAt(make([]byte, 512), 1<<20); err != nil {
		t.Errorf("zeros without the data file: %v", err)
	}
	var kinds []string
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: 2 << 20}) {
		if err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, e.Kind.String())
	}
	if got := strings.Join(kinds, " "); got != "data absent zero absent" {
		t.Errorf("extents: %s", got)
	}
}
