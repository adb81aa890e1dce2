package reposerver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// StateDir is where a server keeps what is its own, in the directory of its
// repositories: keys, tokens, time, policy, and who began which session. No
// repository can have this name.
const StateDir = ".backstay"

// maxState bounds one object of the state, in bytes.
const maxState = 1 << 20

// openState opens what is the server's own in dir, and makes it if need be.
func openState(dir string) (*file.Store, error) {
	st, err := file.Create(filepath.Join(dir, StateDir))
	if err != nil {
		return nil, fmt.Errorf("the server's own directory: %w", err)
	}
	return st, nil
}

func readSmall(ctx context.Context, st *file.Store, name string) ([]byte, error) {
	n, err := st.Size(ctx, name)
	if err != nil {
		return nil, err
	}
	if n > maxState {
		return nil, fault.Corrupt(name, -1, "%d bytes are too many", n)
	}
	b := make([]byte, n)
	k, err := st.ReadAt(ctx, name, b, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return b[:k], nil
}

func writeJSON(ctx context.Context, st blob.Store, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return st.Put(ctx, name, bytes.NewReader(b), int64(len(b)))
}

// policy is what stays in force when a server is started without flags.
type policy struct {
	ImmutableSeconds int64 `json:"immutable_seconds"`
}

const policyName = "policy"

// A ShorterError says that a start would shorten what was promised.
type ShorterError struct{ Was, Wanted time.Duration }

func (e *ShorterError) Error() string {
	return fmt.Sprintf("objects here are immutable for %s, and %s is shorter: %v", e.Was, e.Wanted, fault.ErrDenied)
}

// Is puts it in the class of what one may not do.
func (e *ShorterError) Is(target error) bool { return target == fault.ErrDenied }

// settlePolicy gives what is in force, after want (negative for no word).
func settlePolicy(ctx context.Context, state *file.Store, want time.Duration, shorten bool) (time.Duration, error) {
	var p policy
	b, err := readSmall(ctx, state, policyName)
	switch {
	case errors.Is(err, fault.ErrNotFound):
	case err != nil:
		return 0, err
	case json.Unmarshal(b, &p) != nil || p.ImmutableSeconds < 0:
		return 0, fault.Corrupt("policy", -1, "%q", b)
	}
	held := time.Duration(p.ImmutableSeconds) * time.Second
	if want < 0 || want == held {
		return held, nil
	}
	if want < held && !shorten {
		return 0, &ShorterError{held, want}
	}
	return want, writeJSON(ctx, state, policyName, policy{int64(want / time.Second)})
}
