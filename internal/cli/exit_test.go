package cli

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/hypervisor"
)

// Who interrupts a run is told that nothing is left only if nothing is.
func TestInterruptedHint(t *testing.T) {
	const nothing = "nothing half-made is left"
	broken := fmt.Errorf("restore web01: %w", context.Canceled)
	if got := strings.Join(hints(broken, nil), "\n"); !strings.Contains(got, nothing) {
		t.Errorf("undone: %q", got)
	}
	left := fmt.Errorf("%w; %w: the host does not answer", broken, hypervisor.ErrLeft)
	if got := strings.Join(hints(left, nil), "\n"); strings.Contains(got, nothing) || !strings.Contains(got, "takes away what is left there") {
		t.Errorf("left: %q", got)
	}
}
