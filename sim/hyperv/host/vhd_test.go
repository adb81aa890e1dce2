package host_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// Disks of the older format have checkpoints, chains and merges, and no change
// tracking. They take bytes in odd places, on a last block that is not whole.
func TestVHDs(t *testing.T) {
	const size = 5*mib + 512
	for _, fixed := range []bool{false, true} {
		if testing.Short() && fixed {
			continue
		}
		t.Run(fmt.Sprintf("fixed %v", fixed), func(t *testing.T) {
			b := newBench(t, host.Options{}, host.Spec{IDE: true, Disks: []host.DiskSpec{{Path: `C:\VMs\web01\old.vhd`, Bytes: size, Fixed: fixed}, {Bytes: mib}}})
			write := func(seed byte, off int64, n int) {
				t.Helper()
				if err := b.h.WriteBytes("web01", 0, off, []byte(strings.Repeat(string('a'+rune(seed)), n))); err != nil {
					t.Fatal(err)
				}
			}
			now := func() []byte { return b.read(b.files(settings(b.id))[0]) }
			write(0, 2*mib-700, 1500)
			write(1, size-1000, 1000)
			if err := b.h.Write("web01", 0, 4*mib, 65536, 7); err != nil {
				t.Fatal(err)
			}
			b.same("before", now(), b.expected(0, "", size))
			var chain []cim.Ref
			for n := range byte(3) {
				cp := b.checkpoint([]string{"2", "32768", "2"}[n])
				if file := b.files(cp)[0]; !strings.HasSuffix(file, "vhd") {
					t.Errorf("a file of its is %s", file)
				}
				chain = append(chain, cp)
				write(2+n, int64(n)*mib+3, 70000)
				write(5+n, size-512, 512)
				if err := b.h.Write("web01", 0, 4*mib+int64(n)*4096, 4096, 0); err != nil {
					t.Fatal(err)
				}
			}
			check := func(left []cim.Ref) {
				t.Helper()
				b.same("now", now(), b.expected(0, "", size))
				for _, cp := range left {
					b.same("a checkpoint", b.read(b.files(cp)[0]), b.expected(0, cp.Keys["InstanceID"], size))
				}
			}
			check(chain)
			made, job := b.job(snapshots, "ConvertToReferencePoint", args{"AffectedSnapshot": cim.To(chain[1])})
			b.must(job)
			if ids := b.instance(one(b, made)).Get("VirtualDiskIdentifiers").Items; len(ids) != 1 {
				t.Errorf("tracked are %v", ids)
			}
			check([]cim.Ref{chain[0], chain[2]})
			for n, cp := range []cim.Ref{chain[0], chain[2]} {
				_, job := b.job(snapshots, "DestroySnapshot", args{"AffectedSnapshot": cim.To(cp)})
				b.must(job)
				check([]cim.Ref{chain[0], chain[2]}[n+1:])
			}
			if left, _ := filepath.Glob(b.h.Local(`C:\VMs\web01`) + "/*.avhd"); left != nil {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// What a host says of a disk's file is its format's.
func TestWhatAHostSaysOfAVHD(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{IDE: true, Disks: []host.DiskSpec{{Path: `C:\VMs\web01\old.vhd`, Bytes: mib}}})
	cp := b.checkpoint("2")
	for path, want := range map[string][2]string{b.files(cp)[0]: {"2", "3"}, b.files(settings(b.id))[0]: {"2", "4"}} {
		out, code := b.call("Msvm_ImageManagementService", "GetVirtualHardDiskSettingData", args{"Path": cim.Text(path)})
		if code != 0 {
			t.Fatal(code)
		}
		i, err := cim.ParseEmbedded(cim.Virtualization, out["SettingData"].String())
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]string{i.Get("Format").String(), i.Get("Type").String()}; got != want || i.Get("VirtualDiskId").String() == "" {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
	for _, test := range []struct {
		path, format string
		want         uint32
	}{{`C:\new.vhd`, "2", 4096}, {`C:\new.vhdx`, "3", 4096}, {`C:\wrong.vhd`, "3", 32773}} {
		s := cim.New(cim.Virtualization, "Msvm_VirtualHardDiskSettingData").Put("Path", cim.Text(test.path)).Put("Type", cim.Text("3")).Put("Format", cim.Text(test.format)).Put("MaxInternalSize", cim.Number(mib))
		out, code := b.call("Msvm_ImageManagementService", "CreateVirtualHardDisk", args{"VirtualDiskSettingData": cim.Text(s.Embedded())})
		if code != test.want {
			t.Errorf("%s of format %s: %d", test.path, test.format, code)
		}
		if code == 4096 {
			_, job := b.wait(*out["Job"].Ref)
			b.must(job)
			b.read(test.path)
		}
	}
}
