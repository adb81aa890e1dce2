package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// cowd makes a COWD extent of a disk of so many sectors that holds those of
// the given numbers, as the description has it.
func cowd(disk []byte, held []int) []byte {
	tables := (len(disk)/512 + 4095) / 4096
	p := make([]byte, 512*(4+1+tables*32))
	copy(p, "COWD")
	for i, v := range []int{1, 3, len(disk) / 512, 1, 4, tables} {
		binary.LittleEndian.PutUint32(p[4+4*i:], uint32(v))
	}
	table := 5
	for _, s := range held {
		gde := p[4*512+s/4096*4:]
		if binary.LittleEndian.Uint32(gde) == 0 {
			binary.LittleEndian.PutUint32(gde, uint32(table))
			table += 32
		}
		gte := p[int(binary.LittleEndian.Uint32(gde))*512+s%4096*4:]
		binary.LittleEndian.PutUint32(gte, uint32(len(p)/512))
		p = append(p, disk[s*512:(s+1)*512]...)
	}
	return p
}

// An old ESXi's snapshot: a flat base on a datastore, and a delta of single
// sectors over it, found by the path of a host that is not here.
func TestESXiSnapshot(t *testing.T) {
	dir := t.TempDir()
	disk := imagetest.NewDisk(31, 8<<20)
	base := filepath.Join(dir, "web01.vmdk")
	writeDisk(t, base, disk, image.CreateOptions{Variant: vmdk.VMFS})
	want := make([]byte, disk.Size())
	if _, err := disk.ReadAt(want, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	held := []int{0, 1, 5, 4095, 4096, 9000, 16383}
	for _, s := range held {
		copy(want[s*512:], bytes.Repeat([]byte{byte(s), 77}, 256))
	}
	img, err := openPath(base)
	if err != nil {
		t.Fatal(err)
	}
	cid := img.Info().Identity
	img.Close()
	top := filepath.Join(dir, "web01-000001.vmdk")
	if err := os.WriteFile(filepath.Join(dir, "web01-000001-delta.vmdk"), cowd(want, held), 0o600); err != nil {
		t.Fatal(err)
	}
	text := func(cid, hint string) {
		t.Helper()
		s := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=8f67ca74\nparentCID=%s\ncreateType=\"vmfsSparse\"\nparentFileNameHint=\"%s\"\n# Extent description\nRW 16384 VMFSSPARSE \"web01-000001-delta.vmdk\"\n", cid, hint)
		if err := os.WriteFile(top, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, hint := range []string{"web01.vmdk", "/vmfs/volumes/5f0a-11/web01/web01.vmdk", `C:\Virtual Machines\web01\web01.vmdk`} {
		text(cid, hint)
		img, err := openPath(top)
		if err != nil {
			t.Fatalf("%s: %v", hint, err)
		}
		imagetest.Reader(t, img, bytes.NewReader(want))
		own := int64(0)
		for e, err := range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Depth == 0 && e.Kind == image.Data {
				own += e.Len
			}
		}
		if own != int64(len(held))*512 {
			t.Errorf("the delta holds %d bytes, want %d sectors", own, len(held))
		}
		img.Close()
	}
	// A base that was written to since is another disk.
	text("0badcafe", "web01.vmdk")
	if _, err := openPath(top); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), cid) || !strings.Contains(err.Error(), "0badcafe") {
		t.Errorf("a parent of another CID: %v", err)
	}
}
