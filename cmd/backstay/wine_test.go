package main_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Where Debian has Wine.
const (
	wine64     = "/usr/lib/wine/wine64"
	wineserver = "/usr/lib/wine/wineserver64"
)

// The Windows build starts, reads images, backs up and restores. Only "make
// windows" asks for Wine, which is 700 MB; it is no Windows, and no test of the
// hypervisors there.
func TestWindowsBuildUnderWine(t *testing.T) {
	if os.Getenv("BACKSTAY_WINE") != "1" {
		t.Skip("needs Wine: make windows")
	}
	if _, err := os.Stat(wine64); err != nil || runtime.GOARCH != "amd64" {
		t.Fatalf("this test needs %s on amd64", wine64)
	}
	dir := t.TempDir()
	w := &windows{t: t, dir: dir, exe: filepath.Join(dir, "backstay.exe")}
	build := exec.Command("go", "build", "-trimpath", "-o", w.exe, ".")
	build.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { // before the directory goes: it writes its registry there
		ctx := context.WithoutCancel(t.Context())
		w.command(ctx, wineserver, "-k").Run()
		w.command(ctx, wineserver, "-w").Run()
	})
	if err := os.Mkdir(filepath.Join(dir, "prefix"), 0o755); err != nil {
		t.Fatal(err)
	}
	// One server for all that follows: each program would wait for the end of
	// its own. What these leave running would keep a pipe open.
	for _, args := range [][]string{{wineserver, "-p"}, {wine64, "wineboot", "-i"}} {
		if err := w.command(t.Context(), args[0], args[1:]...).Run(); err != nil {
			t.Fatalf("%s: %v", args, err)
		}
	}
	// Go's programs ask this library for random numbers, and Wine 8 has none.
	library := filepath.Join(dir, "prefix", "drive_c", "windows", "system32", "bcryptprimitives.dll")
	if err := os.WriteFile(library, forwarder("bcryptprimitives.dll", "ProcessPrng", "advapi32.SystemFunction036"), 0o644); err != nil {
		t.Fatal(err)
	}
	drive := filepath.Join(dir, "prefix", "dosdevices", "z:")
	os.Remove(drive) // the whole file system
	if err := os.Symlink(dir, drive); err != nil {
		t.Fatal(err)
	}
	disk := bytes.Repeat([]byte("sixteen bytes..."), 1<<16) // 1 MiB
	w.write("disk.raw", disk)
	w.run(`^backstay version `, "--version")
	w.run(`(?s)Every restore point is a full.*backup`, "help")
	w.run(`made repository`, "repo", "init", "--repo", `Z:\repo`)
	w.run(`disk.raw.*`, "image", "convert", `Z:\disk.raw`, `Z:\disk.vhdx`)
	w.run(`vhdx`, "image", "info", `Z:\disk.vhdx`)
	w.run(`full`, "backup", `Z:\disk.vhdx`, "--vm", "web01", "--repo", `Z:\repo`)
	copy(disk[512<<10:], "changed")
	w.write("disk.raw", disk)
	w.run(`disk.raw.*`, "image", "convert", `Z:\disk.raw`, `Z:\disk.vhdx`, "--force")
	w.run(`compared`, "backup", `Z:\disk.vhdx`, "--vm", "web01", "--repo", `Z:\repo`)
	w.run(`web01/`, "point", "list", "--repo", `Z:\repo`)
	w.run(`restored`, "restore", "web01", "--to", `Z:\back.raw`, "--repo", `Z:\repo`)
	w.run(``, "repo", "check", "--read-data", "--repo", `Z:\repo`)
	got, err := os.ReadFile(filepath.Join(dir, "back.raw"))
	if err != nil || !bytes.Equal(bytes.TrimRight(got, "\x00"), disk) {
		t.Errorf("the restored disk is not what was backed up: %d bytes, %v", len(got), err)
	}
}

// windows runs a program under Wine. Its drive Z: is dir.
type windows struct {
	t        *testing.T
	dir, exe string
}

func (w *windows) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "WINEPREFIX="+filepath.Join(w.dir, "prefix"), "WINEDEBUG=-all", "WINEDLLOVERRIDES=mscoree,mshtml=", "DISPLAY=",
		"WINESERVER="+wineserver, "BACKSTAY_PASSWORD=correct horse")
	cmd.Dir = w.dir
	cmd.WaitDelay = time.Minute
	return cmd
}

func (w *windows) write(name string, data []byte) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), data, 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// run runs backstay.exe, and wants it to end well and to say that.
func (w *windows) run(want string, args ...string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	out, err := w.command(ctx, wine64, append([]string{w.exe}, args...)...).CombinedOutput()
	w.t.Logf("backstay.exe %s: %.1f s", strings.Join(args, " "), time.Since(start).Seconds())
	if err != nil || !regexp.MustCompile(want).Match(out) {
		w.t.Fatalf("backstay.exe %s: %v, want %q:\n%s", strings.Join(args, " "), err, want, out)
	}
}

// forwarder is a DLL whose one function is that of another library. It holds no
// code: headers, and a section with the names.
func forwarder(name, function, to string) []byte {
	const (
		headers, section = 0x200, 0x1000 // in the file, in memory
		table            = 40            // length of the export directory, after which come the tables
	)
	names := table + 4 + 4 + 2
	texts := strings.Join([]string{name, function, to, ""}, "\x00")
	at := func(s string) uint32 { return section + uint32(names+strings.Index(texts, s+"\x00")) }
	le := binary.LittleEndian
	exports := make([]byte, names, 0x200)
	for off, v := range map[int]uint32{12: at(name), 16: 1, 20: 1, 24: 1, 28: section + table, 32: section + table + 4, 36: section + table + 8, table: at(to), table + 4: at(function)} {
		le.PutUint32(exports[off:], v)
	}
	exports = append(exports, texts...)
	out := make([]byte, 2*headers)
	copy(out, "MZ")
	le.PutUint32(out[0x3c:], 0x40)
	copy(out[0x40:], "PE\x00\x00")
	coff := out[0x44:]
	le.PutUint16(coff, 0x8664)      // x86-64
	le.PutUint16(coff[2:], 1)       // sections
	le.PutUint16(coff[16:], 240)    // length of what follows
	le.PutUint16(coff[18:], 0x2022) // a program that is a library
	optional := coff[20:]
	le.PutUint16(optional, 0x20b)
	le.PutUint32(optional[8:], headers) // initialized data
	le.PutUint64(optional[24:], 0x180000000)
	le.PutUint32(optional[32:], section)
	le.PutUint32(optional[36:], headers)
	le.PutUint16(optional[40:], 6) // of the system
	le.PutUint16(optional[48:], 6) // of the subsystem
	le.PutUint32(optional[56:], 2*section)
	le.PutUint32(optional[60:], headers)
	le.PutUint16(optional[68:], 3)     // a console's
	le.PutUint16(optional[70:], 0x100) // no code in data
	le.PutUint64(optional[72:], 1<<20)
	le.PutUint64(optional[88:], 1<<20)
	le.PutUint32(optional[108:], 16)
	le.PutUint32(optional[112:], section)
	le.PutUint32(optional[116:], uint32(len(exports)))
	header := optional[240:]
	copy(header, ".edata")
	le.PutUint32(header[8:], uint32(len(exports)))
	le.PutUint32(header[12:], section)
	le.PutUint32(header[16:], headers)
	le.PutUint32(header[20:], headers)
	le.PutUint32(header[36:], 0x40000040) // data that is read
	copy(out[headers:], exports)
	return out
}
