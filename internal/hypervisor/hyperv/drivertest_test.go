package hyperv

import (
	"testing"

	"github.com/backstay/backstay/internal/hypervisor/drivertest"
	"github.com/backstay/backstay/internal/image/imagetest"
)

func TestConformance(t *testing.T) {
	drivertest.Run(t, func(t *testing.T) drivertest.Subject {
		h := newFakeHost(t)
		return drivertest.Subject{Driver: h.driver(imagetest.MemoryDir(t), Options{}), Name: "web01", Disk: "scsi0:0", Write: h.write,
			Tracks: true, LoseTracking: func() { h.mu.Lock(); h.epoch++; h.mu.Unlock() }}
	})
}
