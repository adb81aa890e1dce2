package backup_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/fake"
	"github.com/backstay/backstay/internal/vm"
)

// A VM that was deleted and made again under its name since its host was asked
// does not get a point under the old one's history by that run.
func TestVMIsMadeAgainMeanwhile(t *testing.T) {
	w := memWorld(t, 1*mib)
	w.vm.Write("vda", 0, noise(1, unit))
	w.backUp()
	r := w.mustOpen()
	defer r.Close()
	job := w.job()
	job.Driver = &remade{w.host}
	res := backup.Run(t.Context(), w.options(r), []backup.Job{job})[0]
	if !errors.Is(res.Err, backup.ErrOtherVM) || !strings.Contains(res.Err.Error(), "made-again") || res.Point != nil {
		t.Errorf("%+v, %v", res.Point, res.Err)
	}
	w.wantClean(1)
	w.backUp()
	if refs := w.verify(w.store); len(refs) != 2 {
		t.Errorf("points %q", refs)
	}
}

// remade is a host that has made its VMs again since it listed them.
type remade struct{ *fake.Host }

func (r *remade) Begin(ctx context.Context, name string, o hypervisor.Options) (hypervisor.Session, error) {
	s, err := r.Host.Begin(ctx, name, o)
	if err != nil {
		return nil, err
	}
	return remadeSession{s}, nil
}

type remadeSession struct{ hypervisor.Session }

func (s remadeSession) Machine() vm.Machine {
	m := s.Session.Machine()
	m.UUID = "made-again"
	return m
}
