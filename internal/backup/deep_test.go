package backup_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/hypervisor"
)

// deepReads is more than there are processors where this runs, and workers.
const deepReads = 100

// A deepHost has disks that answer nobody until deepReads have asked.
type deepHost struct {
	hypervisor.Driver
	asked sync.WaitGroup
}

type deepSession struct {
	hypervisor.Session
	host *deepHost
}

type deepDisk struct {
	hypervisor.Disk
	host *deepHost
}

func (h *deepHost) Begin(ctx context.Context, name string, o hypervisor.Options) (hypervisor.Session, error) {
	s, err := h.Driver.Begin(ctx, name, o)
	return deepSession{s, h}, err
}

func (s deepSession) Disks() (out []hypervisor.Disk) {
	for _, d := range s.Session.Disks() {
		out = append(out, deepDisk{d, s.host})
	}
	return out
}

func (d deepDisk) Reads() int { return deepReads }

func (d deepDisk) ReadAt(p []byte, off int64) (int, error) {
	d.host.asked.Done()
	all := make(chan struct{})
	go func() { d.host.asked.Wait(); close(all) }()
	select {
	case <-all:
		return d.Disk.ReadAt(p, off)
	case <-time.After(10 * time.Minute):
		return 0, errors.New("the others were not asked for")
	}
}

// As many reads of a disk that is far away are under way as it has use for.
func TestManyReadsOfADiskFarAway(t *testing.T) {
	w := newWorld(t, mem.New())
	w.vm.AddDisk("vda", deepReads*unit)
	for i := range int64(deepReads) {
		w.vm.Write("vda", i*unit, []byte("x"))
	}
	host := &deepHost{Driver: w.host}
	host.asked.Add(deepReads)
	job := w.job()
	job.Driver = host
	r := w.mustOpen()
	defer r.Close()
	if res := backup.Run(t.Context(), w.options(r), []backup.Job{job})[0]; res.Err != nil {
		t.Error(res.Err)
	}
}
