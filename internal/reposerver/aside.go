package reposerver

import (
	"context"
	"errors"
	"time"

	"github.com/backstay/backstay/internal/fault"
)

// While objects are immutable for some time, what an admin deletes over the
// network is set aside for as long again: a young point rests on old packs, and
// those may be deleted by age alone. Each hour of the server's clock has a
// directory of its own, named by when it began.
const asideHour = "20060102t15"

// A name set aside twice in an hour would need to be held for less than one.
func (s *Server) asideName() string { return s.clock.now().UTC().Format(asideHour) }

// asideOver says whether all that was set aside in an hour has been so for as
// long as objects are held. What no server named stays.
func (s *Server) asideOver(hour string) bool {
	began, err := time.Parse(asideHour, hour)
	return err == nil && s.clock.now().Sub(began) > s.held+time.Hour+stampSlack
}

// forgetAside removes for good what was set aside long enough ago.
func (s *Server) forgetAside(ctx context.Context) {
	names, err := s.Repositories()
	if err != nil {
		s.log.Error("what was set aside could not be looked at", "error", err)
		return
	}
	for _, name := range names {
		st, err := s.repository(name)
		if errors.Is(err, fault.ErrNotFound) {
			continue // a file, or gone
		}
		n := 0
		if err == nil {
			n, err = st.ForgetAside(ctx, s.asideOver)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("what was set aside could not be removed", "repository", name, "error", err)
		}
		if n > 0 {
			s.log.Info("removed what was set aside", "repository", name, "objects", n)
		}
	}
}

// sweep calls forgetAside now and then until ctx ends.
func (s *Server) sweep(ctx context.Context) {
	t := time.NewTicker(10 * time.Minute)
	defer t.Stop()
	for {
		s.forgetAside(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
