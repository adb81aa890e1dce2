package hyperv

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
	simwsman "github.com/backstay/backstay/sim/hyperv/wsman"
)

// Eight VMs on two volumes in one run: never more than four have a checkpoint at
// once, and two on one volume; the one whose host refuses fails alone.
func TestManyVMs(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	s := newSite(t)
	const vms = 8
	var names []string
	for i := range vms {
		name := fmt.Sprintf("many%d", i)
		path := fmt.Sprintf(`%c:\VMs\%s\%s.vhdx`, "CD"[i%2], name, name)
		if _, err := s.host.AddVM(host.Spec{Name: name, Disks: []host.DiskSpec{{Path: path, Bytes: 4 << 20}}}); err != nil {
			t.Fatal(err)
		}
		if err := s.host.WriteBytes(name, 0, 0, []byte(name)); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	var mu sync.Mutex
	most := map[string]int{}
	look := func(n int, _ string) simwsman.Trouble {
		if n%4 != 0 { // it costs as much as the request
			return simwsman.None
		}
		now := map[string]int{}
		for _, i := range s.host.Instances(cim.Virtualization, classSettings) {
			if i.Get("VirtualSystemType").String() == typeRecovery {
				now["the host"]++
				now[s.volume(i.Get("InstanceID").String())]++
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for where, n := range now {
			most[where] = max(most[where], n)
		}
		return simwsman.None
	}
	// Jobs that take a while keep the sessions beside each other.
	s.host.SetTrouble(func(x *host.Trouble) {
		x.SlowJobs = 10 * time.Millisecond
		x.FailJob = map[string]string{"CreateSnapshot": "no room for it"}
	})
	d := s.driver(Options{})
	defer d.Close()
	s.mu.Lock()
	s.spoil = look
	s.mu.Unlock()
	var jobs []backup.Job
	for _, name := range names {
		jobs = append(jobs, backup.Job{Driver: d, Name: name, Consistency: vm.Crash})
	}
	results := backup.Run(t.Context(), backup.Options{Repo: s.repo, Audit: -1, VMs: vms}, jobs)
	s.mu.Lock()
	s.spoil = nil
	s.mu.Unlock()
	failed := 0
	for i, r := range results {
		if r.Err != nil {
			if failed++; !strings.Contains(r.Err.Error(), "no room for it") || !strings.Contains(r.Err.Error(), names[i]) {
				t.Errorf("%s: %v", names[i], r.Err)
			}
			continue
		}
		disk, err := s.repo.OpenDisk(t.Context(), r.Point.Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(names[i]))
		if _, err := io.ReadFull(io.NewSectionReader(disk, 0, disk.Size()), got); err != nil || string(got) != names[i] {
			t.Errorf("the point of %s begins with %q, %v", names[i], got, err)
		}
		disk.Close()
	}
	if failed != 1 {
		t.Errorf("%d of %d failed, want 1", failed, vms)
	}
	if most["the host"] > sessionsPerHost || most["C"] > sessionsPerVolume || most["D"] > sessionsPerVolume || most["C"] == 0 || most["D"] == 0 {
		t.Errorf("checkpoints at once: %v, want at most %d on the host and %d on a volume", most, sessionsPerHost, sessionsPerVolume)
	}
	s.wantTidy(vms - 1)
}

// volume is the drive of a checkpoint's disk.
func (s *site) volume(checkpoint string) string {
	for _, i := range s.host.Instances(cim.Virtualization, "Msvm_StorageAllocationSettingData") {
		if strings.HasPrefix(i.Get("InstanceID").String(), checkpoint+`\`) && i.Get("HostResource").Set {
			return i.Get("HostResource").String()[:1]
		}
	}
	return "?"
}
