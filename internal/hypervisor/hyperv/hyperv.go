// Package hyperv drives the VMs of a Hyper-V host without a program on it: WMI
// calls over WS-Management hold one still by a recovery checkpoint, and its
// frozen disks are read over SMB.
//
//	lock ─ reap ─ look ─ checkpoint ─ read ─► restore point ─ convert ─ drop the older
//
// What the host remembers of a checkpoint that was converted, it calls a
// reference point: a moment since which it tracks writes. docs/design/hyperv.md
// says what was chosen, and hyperv-evidence.md on what each belief rests.
package hyperv

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/wsman"
)

// Options say which host to speak to, and how.
type Options struct {
	Host     *url.URL // as ParseSource gives it
	Password secret.Bytes
	StateDir string // journal and locks; "" for /var/lib/backstay
	Log      *slog.Logger

	// Record, where set, is called with each request and its answer, as
	// wsman.Config says.
	Record func(wsman.Exchange)

	// AllowSavedState lets a backup fall back to a checkpoint that saves the
	// guest's memory, where the host can make no other.
	AllowSavedState bool
	// TruncateLogs has applications in a Windows guest truncate their logs, as
	// after a backup of their own. They do it when the checkpoint is made, before
	// there is a restore point.
	TruncateLogs bool
	// MergeWait is how long Commit watches the host merge what the guest wrote
	// meanwhile; 0 for an hour. The host goes on by itself.
	MergeWait time.Duration
}

// Bounds of what one host is asked to bear at once, over all sessions of a
// Driver.
const (
	sessionsPerHost   = 4
	sessionsPerVolume = 2
)

// repoPrefix begins the names of all that is made for one repository.
func repoPrefix(repoID string) (string, error) {
	if len(repoID) < 8 || strings.ContainsFunc(repoID[:8], func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z')
	}) {
		return "", fmt.Errorf("repository id %q: %w", repoID, fault.ErrUnsupported)
	}
	return "backstay-" + repoID[:8] + "-", nil
}

// newRun names one session.
func newRun() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
