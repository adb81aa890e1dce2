//go:build linux

package kvm

import (
	"errors"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/backstay/backstay/internal/fault"
)

// A VM that starts or stops between two questions is asked again: the reason
// why it runs must not be taken for the reason why it stopped. "Booted" and
// "shut down cleanly" are the same number.
func TestStateOfOneMoment(t *testing.T) {
	type answer struct {
		on     bool
		state  libvirt.DomainState
		reason int32
	}
	for _, c := range []struct {
		name    string
		answers []answer
		want    answer
		asked   int
	}{
		{"runs", []answer{{true, libvirt.DomainRunning, 1}}, answer{true, libvirt.DomainRunning, 1}, 1},
		{"is paused", []answer{{true, libvirt.DomainPaused, 1}}, answer{true, libvirt.DomainPaused, 1}, 1},
		{"is off", []answer{{false, libvirt.DomainShutoff, 2}}, answer{false, libvirt.DomainShutoff, 2}, 1},
		{"stops", []answer{{true, libvirt.DomainShutoff, 2}, {false, libvirt.DomainShutoff, 2}}, answer{false, libvirt.DomainShutoff, 2}, 2},
		{"starts", []answer{{false, libvirt.DomainRunning, 1}, {true, libvirt.DomainRunning, 1}}, answer{true, libvirt.DomainRunning, 1}, 2},
		{"crashed and kept", []answer{{true, libvirt.DomainCrashed, 1}}, answer{true, libvirt.DomainCrashed, 1}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := 0
			on, state, reason, err := steady(t.Context(), time.Microsecond, func() (bool, libvirt.DomainState, int32, error) {
				a := c.answers[min(n, len(c.answers)-1)]
				n++
				return a.on, a.state, a.reason, nil
			})
			if got := (answer{on, state, reason}); err != nil || got != c.want || n != c.asked {
				t.Errorf("%+v after %d questions, %v; want %+v after %d", got, n, err, c.want, c.asked)
			}
		})
	}
	_, _, _, err := steady(t.Context(), time.Microsecond, func() (bool, libvirt.DomainState, int32, error) {
		return false, libvirt.DomainRunning, 1, nil
	})
	if !errors.Is(err, fault.ErrLocked) {
		t.Errorf("one that never settles: %v", err)
	}
}
