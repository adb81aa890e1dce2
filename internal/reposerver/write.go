package reposerver

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// put stores an object. What can be refused is refused before the body is read.
func (x *exchange) put() error {
	size := x.r.ContentLength
	sum, err := x.hashHeader()
	if err != nil {
		return err
	}
	match, err := x.one("If-None-Match")
	if err != nil {
		return err
	}
	rule := ruleFor(x.to.Name)
	switch {
	case size < 0:
		return refuse(http.StatusLengthRequired, "the length of the body must be said before")
	case size > rule.maxBytes:
		return refuse(http.StatusRequestEntityTooLarge, "%d bytes are too many for %s: at most %d", size, x.to.Name, rule.maxBytes)
	case match != "" && match != "*":
		return refuse(http.StatusBadRequest, "the one condition that is known is If-None-Match: *")
	case x.r.Header.Get("Content-Encoding") != "" || x.r.Header.Get("Content-Range") != "":
		return refuse(http.StatusBadRequest, "a body is stored as it is, and whole")
	}
	createOnly := match == "*"
	mayReplace, err := x.mayPut(rule, sum)
	if err != nil {
		return err
	}
	there, same := false, false
	held := rule.held && x.s.held > 0
	if createOnly || !mayReplace || held {
		if there, same, err = x.holds(size, sum); err != nil {
			return err
		}
	}
	switch {
	case there && same && !createOnly:
		// It may be there by somebody who has not yet come to make it durable.
		if err := x.store.SyncName(x.to.Name); err != nil {
			return err
		}
		x.w.WriteHeader(http.StatusNoContent)
		return nil
	case there && (createOnly || !mayReplace):
		if err := x.store.SyncName(x.to.Name); err != nil {
			return err
		}
		return fmt.Errorf("%s: %w", x.to.Name, fault.ErrExists)
	case there && held:
		return fmt.Errorf("%s is immutable, and nothing overwrites it over the network: %w", x.to.Name, fault.ErrDenied)
	case held:
		mayReplace = false // what appears meanwhile is young
	}
	body := &upload{r: x.r.Body, rc: x.rc, stall: x.s.limit.stall, size: size, want: sum, hash: blake3.New()}
	if size == 0 && !body.sound() {
		return refuse(http.StatusUnprocessableEntity, "%v", errHash)
	}
	// Only what backup clients store is bounded: an admin's vacuum needs room to
	// make room.
	was, err := x.s.quota.sizeOf(x.r.Context(), x.store, x.to.Name)
	if err != nil {
		return err
	}
	if err := x.s.quota.take(x.r.Context(), x.to.Repo, x.store, size, x.grant.Role != Admin); err != nil {
		return err
	}
	// The object is stored or not, also if the client goes away meanwhile.
	ctx := context.WithoutCancel(x.r.Context())
	var src io.ReaderAt = body
	if x.grant.Role == Admin && size <= maxFreeing && x.r.Header.Get(remote.FreeingHeader) == "1" {
		ctx, src = blob.Freeing(ctx), &smallUpload{upload: body}
	}
	status := http.StatusCreated
	if createOnly || !mayReplace {
		err = x.store.Create(ctx, x.to.Name, src, size)
		if errors.Is(err, fault.ErrExists) && !createOnly {
			// Somebody was faster; perhaps with the same bytes.
			if _, same, cmpErr := x.holds(size, sum); cmpErr != nil {
				err = cmpErr
			} else if same {
				status, err = http.StatusNoContent, nil
			}
		}
	} else {
		err = x.store.Put(ctx, x.to.Name, src, size)
	}
	stored := err == nil && status == http.StatusCreated
	if x.s.quota.came(x.to.Repo, size, stored); stored {
		x.s.quota.gone(x.to.Repo, was)
	}
	switch {
	case body.broken != nil:
		return refuse(http.StatusRequestTimeout, "the body did not arrive: %v", body.broken)
	case errors.Is(err, errHash):
		return refuse(http.StatusUnprocessableEntity, "%v", errHash)
	case err != nil:
		return err
	}
	_ = x.rc.SetWriteDeadline(time.Now().Add(x.s.limit.stall))
	x.w.WriteHeader(status)
	return nil
}

// denied says that a token may not do that.
func (x *exchange) denied(what string) error {
	return fmt.Errorf("a token of role %s may not %s %s: %w", x.grant.Role, what, x.to.Name, fault.ErrDenied)
}

// mayPut says whether this token may store an object of this name, and whether
// it may overwrite one.
func (x *exchange) mayPut(rule rule, sum [32]byte) (mayReplace bool, err error) {
	ctx, name := x.r.Context(), x.to.Name
	switch {
	case x.grant.Role == Admin:
		return true, nil
	case x.grant.Role != Backup:
		return false, x.denied("store")
	}
	switch rule.backup {
	case found:
		_, err := x.store.Size(ctx, "repo.json")
		switch {
		case errors.Is(err, fault.ErrNotFound), err == nil && name == "repo.json": // which exists, and so is refused
			return false, nil
		case err != nil:
			return false, err
		}
		return false, x.denied("add, now that the repository is founded,")
	case create:
		return false, nil
	case createHashed:
		if !strings.HasSuffix(name, "/"+hex.EncodeToString(sum[:])) {
			return false, fmt.Errorf("%s is not named by the hash of its bytes: %w", name, fault.ErrDenied)
		}
		return false, nil
	case createBound:
		session, err := rule.session(name)
		if err != nil {
			return false, err
		}
		owner, err := x.owner(ctx, session)
		if err == nil && owner != x.grant.Name {
			err = fmt.Errorf("session %s was not begun with this token: %w", session, fault.ErrDenied)
		}
		return false, err
	case own:
		session, err := rule.session(name)
		if err != nil {
			return false, err
		}
		return true, x.claim(ctx, session)
	}
	return false, x.denied("store")
}

// delete removes an object, if anybody may.
func (x *exchange) delete() error {
	rule := ruleFor(x.to.Name)
	ctx := x.r.Context()
	was, err := x.s.quota.sizeOf(ctx, x.store, x.to.Name)
	if err != nil {
		return err
	}
	switch {
	case x.grant.Role == Admin:
		_, err := x.store.Size(ctx, x.to.Name)
		switch {
		case errors.Is(err, fault.ErrNotFound): // also a delete of what is gone is made durable below
		case err != nil:
			return err
		default:
			if err := x.letGo(rule); err != nil {
				return err
			}
			x.s.log.Info("deleted", "from", x.r.RemoteAddr, "token", x.grant.Name, "repository", x.to.Repo, "object", x.to.Name)
			if rule.held && x.s.held > 0 {
				if err := x.store.SetAside(context.WithoutCancel(ctx), x.to.Name, x.s.asideName()); err != nil {
					return err
				}
				x.s.quota.gone(x.to.Repo, was)
				x.w.WriteHeader(http.StatusNoContent)
				return nil
			}
		}
	case x.grant.Role == Backup && rule.backup == own:
		if err := x.disown(ctx, rule); err != nil {
			return err
		}
	default:
		return x.denied("delete")
	}
	if err := x.store.Delete(context.WithoutCancel(ctx), x.to.Name); err != nil {
		return err
	}
	x.s.quota.gone(x.to.Repo, was)
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

// disown gives up a session that this token began. That of nobody is no error,
// if it is gone: a client whose first try was not answered comes again.
func (x *exchange) disown(ctx context.Context, rule rule) error {
	session, err := rule.session(x.to.Name)
	if err != nil {
		return err
	}
	owner, err := x.owner(ctx, session)
	if err != nil {
		return err
	}
	if owner == x.grant.Name {
		// First the object, then its owner: never an object without one.
		if err := x.store.Delete(context.WithoutCancel(ctx), x.to.Name); err != nil {
			return err
		}
		return x.s.state.Delete(context.WithoutCancel(ctx), ownerPrefix+x.to.Repo+"/"+session)
	}
	if _, err := x.store.Size(ctx, x.to.Name); !errors.Is(err, fault.ErrNotFound) {
		return fmt.Errorf("session %s was not begun with this token: %w", session, fault.ErrDenied)
	}
	return nil
}

// letGo says whether the object that is there may be deleted.
func (x *exchange) letGo(rule rule) error {
	if !rule.held || x.s.held == 0 {
		return nil
	}
	written, err := x.store.Written(x.r.Context(), x.to.Name)
	if err != nil {
		return err
	}
	if age := x.s.clock.age(written); age < x.s.held {
		return fmt.Errorf("%s is immutable for another %s of this server's time: %w", x.to.Name, (x.s.held - age).Round(time.Minute), fault.ErrHeld)
	}
	return nil
}

const ownerPrefix = "owner/"

// owner is the name of the token that began a session; "" if none did.
func (x *exchange) owner(ctx context.Context, session string) (string, error) {
	b, err := readSmall(ctx, x.s.state, ownerPrefix+x.to.Repo+"/"+session)
	if errors.Is(err, fault.ErrNotFound) {
		return "", nil
	}
	return string(b), err
}

// claim makes the session this token's, if it is new.
func (x *exchange) claim(ctx context.Context, session string) error {
	owner, err := x.owner(ctx, session)
	if err != nil {
		return err
	}
	if owner == "" {
		// One that was begun without this server, or that is long over, has no
		// owner and gets none.
		for _, name := range []string{x.to.Name, "outcome/" + session} {
			if _, err := x.store.Size(ctx, name); !errors.Is(err, fault.ErrNotFound) {
				if err != nil {
					return err
				}
				return fmt.Errorf("session %s was not begun with this token: %w", session, fault.ErrDenied)
			}
		}
		err := x.s.state.Create(ctx, ownerPrefix+x.to.Repo+"/"+session, strings.NewReader(x.grant.Name), int64(len(x.grant.Name)))
		if err == nil {
			return nil
		}
		if !errors.Is(err, fault.ErrExists) {
			return err
		}
		if owner, err = x.owner(ctx, session); err != nil {
			return err
		}
	}
	if owner != x.grant.Name {
		return fmt.Errorf("session %s was not begun with this token: %w", session, fault.ErrDenied)
	}
	return nil
}

// forgetSessions drops the owners of sessions that are over: their object is
// gone and their outcome is there.
func (s *Server) forgetSessions(ctx context.Context) error {
	for o, err := range s.state.List(ctx, ownerPrefix) {
		if err != nil {
			return err
		}
		repo, session, ok := strings.Cut(strings.TrimPrefix(o.Name, ownerPrefix), "/")
		if !ok || remote.CheckRepo(repo) != nil {
			continue
		}
		st, err := s.repository(repo)
		if errors.Is(err, fault.ErrNotFound) {
			continue // its disk may not be mounted
		}
		if err != nil {
			return err
		}
		_, begun := st.Size(ctx, "session/"+session)
		_, over := st.Size(ctx, "outcome/"+session)
		if errors.Is(begun, fault.ErrNotFound) && over == nil {
			if err := s.state.Delete(ctx, o.Name); err != nil {
				return err
			}
		}
	}
	return nil
}
