package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/wsman"
)

// How jobs are waited for: without a limit, since merging a disk takes hours.
const (
	jobPoll = 700 * time.Millisecond
	// pollPatience is for how long the host may be out of reach meanwhile.
	pollPatience = 2 * time.Minute
)

// A client calls one host's methods and waits for what they begin.
type client struct {
	management
	poll     time.Duration
	patience time.Duration
}

// query gives all instances that a query finds. It only reads: where the
// connection ended between two pages, all of it is asked for again, since what
// the lost page held nobody would miss.
func (c *client) query(ctx context.Context, wql string) (out []object, err error) {
	for tries := 0; ; tries++ {
		out, err = nil, nil
		for in, one := range c.Query(ctx, wql) {
			if err = one; err != nil {
				break
			}
			out = append(out, object{in})
		}
		var cut *wsman.ConnectionError
		if err == nil || tries == 2 || !errors.As(err, &cut) || !cut.Sent || errors.Is(err, wsman.ErrTimedOut) {
			break
		}
		if err := sleep(ctx, c.poll); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

// start calls a method and gives its results and the job that goes on, whose
// class is empty for none.
func (c *client) start(ctx context.Context, f family, on wsman.Ref, method string, in ...wsman.Argument) (out object, job wsman.Ref, err error) {
	if out.Instance, err = c.Invoke(ctx, on, method, in...); err != nil {
		return object{}, job, err
	}
	code, ok := out.number("ReturnValue")
	switch {
	case !ok:
		return object{}, job, fmt.Errorf("%s: the host's answer has no return value", method)
	case code == returnStarted:
		if job = out.ref("Job"); job.Class == "" {
			return object{}, job, fmt.Errorf("%s: the host began a job and does not say which", method)
		}
	case code != returnDone:
		return object{}, job, &ReturnError{method, code, f}
	}
	return out, job, nil
}

// do calls a method and waits until its job is done.
func (c *client) do(ctx context.Context, f family, on wsman.Ref, method string, in ...wsman.Argument) (out object, err error) {
	out, job, err := c.start(ctx, f, on, method, in...)
	if err != nil || job.Class == "" {
		return out, err
	}
	return out, c.wait(ctx, method, job)
}

// wait waits for a job's end. A job that the host has forgotten has ended, and
// nobody knows how.
func (c *client) wait(ctx context.Context, method string, job wsman.Ref) error {
	unreachable := time.Time{}
	for pause := c.poll / 32; ; pause = min(2*pause, c.poll) { // most jobs are short, and none is over at once
		if err := sleep(ctx, pause); err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
		in, err := c.Get(ctx, job)
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%s: %w", method, context.Cause(ctx))
		case errors.Is(err, fault.ErrNotFound):
			return fmt.Errorf("%s: the host has forgotten the job %s: %w", method, job.Key("InstanceID"), err)
		case errors.Is(err, fault.ErrDenied):
			return fmt.Errorf("%s: %w", method, err)
		case err != nil:
			if unreachable.IsZero() {
				unreachable = time.Now()
			}
			if time.Since(unreachable) > c.patience {
				return fmt.Errorf("%s: ask for its job: %w", method, err)
			}
		default:
			unreachable = time.Time{}
			if ended, err := c.ended(ctx, method, job, object{in}); ended {
				return err
			}
		}
	}
}

// ended says whether a job has, and how.
func (c *client) ended(ctx context.Context, method string, job wsman.Ref, o object) (bool, error) {
	state, ok := o.number("JobState")
	if !ok {
		return true, fmt.Errorf("%s: its job has no state", method)
	}
	switch state {
	case jobCompleted:
		return true, nil
	case jobWithWarnings, jobTerminated, jobKilled, jobException:
	default:
		return false, nil
	}
	e := &JobError{Method: method, State: state, Text: o.text("ErrorDescription")}
	if s := o.text("ErrorSummaryDescription"); e.Text == "" {
		e.Text = s
	}
	e.Code, _ = o.number("ErrorCode")
	if out, err := c.Invoke(ctx, job, "GetErrorEx"); err == nil {
		for _, inner := range (object{out}).embedded("Errors") {
			e.Messages = append(e.Messages, inner.text("Message"))
		}
	}
	return true, e
}

// warned says whether err is of a job that did its work and warns of something.
func warned(err error) bool {
	var j *JobError
	return errors.As(err, &j) && j.State == jobWithWarnings
}

// effectCreate is what a job did to an element that it made.
const effectCreate = 5

// made are the elements of class that a job created. Hosts name them only when
// the job is over; references can't be filtered by, so all rows are read.
func (c *client) made(ctx context.Context, job wsman.Ref, class string) ([]wsman.Ref, error) {
	rows, err := c.query(ctx, "SELECT * FROM "+classAffected)
	if err != nil {
		return nil, fmt.Errorf("what job %s made: %w", job.Key("InstanceID"), err)
	}
	var out []wsman.Ref
	for _, row := range rows {
		if !row.ref("AffectingElement").Equal(job) || !slices.Contains(row.list("ElementEffects"), strconv.Itoa(effectCreate)) {
			continue
		}
		if r := row.ref("AffectedElement"); strings.EqualFold(r.Class, class) && !slices.ContainsFunc(out, r.Equal) {
			out = append(out, r)
		}
	}
	return out, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
