package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image/imagetest"
)

// cliRun runs one command line.
func cliRun(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	a, out, errs := testApp()
	code = a.run(t.Context(), args)
	return code, out.String(), errs.String()
}

func TestImageConvertToEveryFormatAndBack(t *testing.T) {
	disk := imagetest.NewDisk(2, 6<<20)
	src := disk.Save(t)
	dir := t.TempDir()
	for _, c := range []struct{ name, variant, qemu string }{
		{"a.raw", "", "raw"}, {"a.qcow2", "", "qcow2"}, {"a.vhd", "fixed", "vpc"}, {"b.vhd", "dynamic", "vpc"}, {"a.vhdx", "", "vhdx"},
		{"a.vmdk", "", "vmdk"}, {"b.vmdk", "monolithicFlat", "vmdk"}, {"c.vmdk", "streamOptimized", "vmdk"},
	} {
		to := filepath.Join(dir, c.name)
		code, out, errs := cliRun(t, "image", "convert", src, to, "--variant", c.variant)
		if code != exitDone || !strings.Contains(out, "converted") {
			t.Errorf("%s: exit %d\n%s%s", c.name, code, out, errs)
			continue
		}
		if code, out, errs := cliRun(t, "image", "compare", src, to); code != exitDone {
			t.Errorf("%s: compare exits %d\n%s%s", c.name, code, out, errs)
		}
		imagetest.QemuCompare(t, src, "raw", to, c.qemu)
		code, out, _ = cliRun(t, "image", "info", "--json", to)
		var info struct {
			File, Variant string
			VirtualBytes  int64 `json:"virtual_bytes"`
		}
		if err := json.Unmarshal([]byte(out), &info); err != nil || code != exitDone || info.VirtualBytes < disk.Size() || info.File != to {
			t.Errorf("%s: info gives %d, %v\n%s", c.name, code, err, out)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestImageExitCodes(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	content := bytes.Repeat([]byte("some text. "), 100<<10)
	for name, p := range map[string][]byte{
		"a.raw": content, "b.raw": append(bytes.Clone(content), 1), "c.raw": append(bytes.Clone(content), 0),
		"bad.qcow2": append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 4096)...), "odd.vhdx": append([]byte("QFI\xfb"), make([]byte, 4096)...),
	} {
		if err := os.WriteFile(path(name), p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a.raw", path("link.raw")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want int
		say  string // on stdout or stderr
	}{
		{[]string{"image", "convert", "a.raw", "x.qcow2"}, exitDone, "converted"},
		{[]string{"image", "convert", "a.raw", "x.qcow2"}, exitRefused, "--force"},
		{[]string{"image", "convert", "b.raw", "x.qcow2", "--force"}, exitDone, "converted"},
		{[]string{"image", "compare", "b.raw", "x.qcow2"}, exitDone, "identical"},
		{[]string{"image", "convert", "a.raw", "a.raw", "--force"}, exitUsage, "choose another"},
		{[]string{"image", "convert", "b.raw", "link.raw", "--force"}, exitRefused, "no regular file"},
		{[]string{"image", "convert", "a.raw", "x.bin"}, exitUsage, "--output-format"},
		{[]string{"image", "convert", "a.raw", "x.bin", "-O", "vdi"}, exitUsage, "cannot be written"},
		{[]string{"image", "convert", "a.raw", "gone/x.raw"}, exitFailed, "not found"},
		{[]string{"image", "convert", "gone.raw", "y.raw"}, exitFailed, "no such file"},
		{[]string{"image", "info", "gone.raw"}, exitFailed, "hint: check the name"},
		{[]string{"image", "map", "gone.raw"}, exitFailed, "not found"},
		{[]string{"image", "chain", "gone.raw"}, exitFailed, "hint: check the name"},
		{[]string{"image", "compare", "a.raw", "gone.raw"}, exitFailed, "hint: check the name"},
		{[]string{"image", "info", "a.raw", "gone.raw", "b.raw"}, exitFailed, "b.raw"},
		{[]string{"image", "info", "bad.qcow2", "gone.raw", "b.raw"}, exitCorrupt, "b.raw"},
		{[]string{"image", "convert", "bad.qcow2", "y.raw"}, exitCorrupt, "corrupt"},
		{[]string{"image", "convert", "a.raw", "y.vmdk", "--variant", "thick"}, exitUsage, "monolithicFlat"},
		{[]string{"image", "convert", "a.raw", "y.raw", "--variant", "fixed"}, exitUsage, "raw images have none"},
		{[]string{"image", "convert", "a.raw", "y.vhd", "--variant", "fixd"}, exitUsage, "dynamic, fixed"},
		{[]string{"image", "convert", "a.raw", "y.qcow2", "--compression", "lz4"}, exitUsage, "zlib, zstd"},
		{[]string{"image", "convert", "a.raw", "y.vhdx", "--compression", "zstd"}, exitUsage, "none"},
		{[]string{"image", "convert", "a.raw", "y.qcow2", "--level", "3"}, exitUsage, "level 3"},
		{[]string{"image", "convert", "a.raw", "y.qcow2", "--compression", "zlib", "--level", "-3"}, exitUsage, "1 to 9"},
		{[]string{"image", "convert", "a.raw", "y.qcow2", "--block-size", "3K"}, exitUsage, "power of two"},
		{[]string{"image", "convert", "a.raw", "y.vhdx", "--sector-size", "520"}, exitUsage, "512, 4096"},
		{[]string{"image", "convert", "a.raw", "y.vhd", "--sector-size", "4096"}, exitUsage, "512"},
		{[]string{"image", "convert", "a.raw", "z.vhdx", "--sector-size", "4096"}, exitDone, "converted"},
		{[]string{"image", "info", "z.vhdx"}, exitDone, "4096 bytes"},
		{[]string{"image", "convert", "z.vhdx", "z2.vhdx"}, exitDone, "converted"},
		{[]string{"image", "info", "z2.vhdx"}, exitDone, "4096 bytes"},
		{[]string{"image", "convert", "z.vhdx", "z.qcow2"}, exitDone, "sectors of 4096 bytes"},
		{[]string{"image", "convert", "a.raw", "y.qcow2", "--parent", "a.raw"}, exitUsage, "--only-top"},
		{[]string{"image", "convert", "a.raw", "y.qcow2", "--only-top", "--parent-format", "raw"}, exitUsage, "--parent"},
		{[]string{"image", "convert", "a.raw", "y.raw", "--only-top", "--parent", "b.raw"}, exitUsage, "raw images have none"},
		{[]string{"image", "convert", "x.qcow2", "w.qcow2", "--snapshot", "s1"}, exitFailed, "lists its snapshots"},
		{[]string{"image", "map", "x.qcow2", "--bitmap", "b1"}, exitFailed, "lists its bitmaps"},
		{[]string{"image", "map", "a.raw", "--bitmap", "b1"}, exitFailed, "have none"},
		{[]string{"image", "info", "a.raw", "--parents=/nowhere/at/all"}, exitUsage, "is no directory"},
		{[]string{"image", "compare", "a.raw", "b.raw"}, exitFailed, "different: the first difference is at byte 1126400"},
		{[]string{"image", "compare", "a.raw", "b.raw", "--json"}, exitFailed, `"offset":1126400`},
		{[]string{"image", "compare", "a.raw", "c.raw"}, exitDone, "ends in zeros"},
		{[]string{"image", "info", "odd.vhdx"}, exitFailed, "--format"},
		{[]string{"image", "info", "odd.vhdx", "-f", "raw"}, exitDone, "raw"},
		{[]string{"image", "info"}, exitUsage, ""},
		{[]string{"image", "map", "a.raw"}, exitDone, "data"},
		{[]string{"image", "map", "--json", "a.raw"}, exitDone, `"kind":"data"`},
	} {
		args := c.args
		for i := range args[2:] {
			if strings.Contains(args[2+i], ".") {
				args[2+i] = path(args[2+i])
			}
		}
		code, out, errs := cliRun(t, args...)
		if code != c.want || !strings.Contains(out+errs, c.say) {
			t.Errorf("%v: exit %d, want %d with %q\n%s%s", args, code, c.want, c.say, out, errs)
		}
	}
	if p, err := os.ReadFile(path("a.raw")); err != nil || !bytes.Equal(p, content) {
		t.Error("the source was changed")
	}
	for _, pattern := range []string{".*", "y.*"} {
		if left, _ := filepath.Glob(path(pattern)); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
