package wsman

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"time"
)

// Get reads one instance. One that does not exist is in class
// fault.ErrNotFound.
func (c *Client) Get(ctx context.Context, ref Ref) (*Instance, error) {
	answer, err := c.do(ctx, request{action: actionGet, ref: &ref, resource: ref.resource(c.namespace), repeat: true})
	if err == nil && answer == nil {
		err = fmt.Errorf("%w: it holds no instance", ErrProtocol)
	}
	var in *Instance
	if err == nil {
		in, err = decodeObject(answer)
	}
	if err != nil {
		return nil, about("get "+ref.String(), err)
	}
	return in, nil
}

// Put writes the properties of in to an existing instance, and gives back what
// the host then says it holds, nil if it does not say. Hosts have been seen to
// accept and ignore: read what matters again.
func (c *Client) Put(ctx context.Context, ref Ref, in *Instance) (*Instance, error) {
	r := request{action: actionPut, ref: &ref, resource: ref.resource(c.namespace)}
	r.body = func(w *writer) {
		w.raw("<p:")
		w.name(ref.Class)
		w.raw(` xmlns:p="`)
		w.esc(r.resource)
		w.raw(`">`)
		for _, p := range in.props {
			w.argument(p.name, p.value, c.namespace)
		}
		w.raw("</p:" + ref.Class + ">")
	}
	answer, err := c.do(ctx, r)
	if err == nil && answer != nil {
		in, err = decodeObject(answer)
	} else {
		in = nil
	}
	if err != nil {
		return nil, fmt.Errorf("put %s: %w", ref, err)
	}
	return in, nil
}

// An Argument is a parameter of a method.
type Argument struct {
	Name  string
	Value Value
}

// Arg makes an Argument.
func Arg(name string, v Value) Argument { return Argument{name, v} }

// Invoke calls a method of an instance with its parameters in the order that
// the class declares. It gives the results as properties, ReturnValue among
// them; what ReturnValue means is the class's affair, and 4096 is mostly "a job
// was started".
//
// The request is sent once. If the connection fails in between, the error is a
// ConnectionError that says whether the host may have done it.
func (c *Client) Invoke(ctx context.Context, ref Ref, method string, args ...Argument) (*Instance, error) {
	r := request{ref: &ref, resource: ref.resource(c.namespace)}
	r.action = r.resource + "/" + method
	r.body = func(w *writer) {
		w.raw("<p:")
		w.name(method)
		w.raw(`_INPUT xmlns:p="`)
		w.esc(r.resource)
		w.raw(`">`)
		for _, a := range args {
			w.argument(a.Name, a.Value, c.namespace)
		}
		w.raw("</p:" + method + "_INPUT>")
	}
	answer, err := c.do(ctx, r)
	var out *Instance
	switch {
	case err != nil:
	case answer == nil || answer.name != method+"_OUTPUT":
		err = fmt.Errorf("%w: it holds no %s_OUTPUT", ErrProtocol, method)
	default:
		out, err = decodeObject(answer)
	}
	if err != nil {
		return nil, fmt.Errorf("invoke %s of %s: %w", method, ref, err)
	}
	return out, nil
}

// do sends a request, and again after a pause if the connection failed and
// either the request changes nothing or surely did not arrive.
func (c *Client) do(ctx context.Context, r request) (*element, error) {
	for try := 0; ; try++ {
		answer, err := c.once(ctx, r)
		var failed *ConnectionError
		switch {
		case !errors.As(err, &failed), // done, or no matter of the connection
			try == len(c.wait), failed.Sent && !r.repeat, errors.Is(err, ErrTimedOut):
			return answer, err
		}
		var cert *CertificateError
		if errors.As(err, &cert) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(c.wait[try]):
		}
	}
}

// once sends a request once, on a connection of the pool.
func (c *Client) once(ctx context.Context, r request) (*element, error) {
	id := newID()
	envelope, err := c.envelope(r, id)
	if err != nil {
		return nil, err
	}
	x := Exchange{Action: r.action, Request: envelope, Started: time.Now()}
	x.Response, x.Status, x.Err = c.exchange(ctx, envelope)
	x.Took = time.Since(x.Started)
	if c.record != nil {
		c.record(x)
	}
	if x.Err != nil {
		return nil, x.Err
	}
	return readEnvelope(x.Response, id, x.Status)
}

// exchange gives the answer to an envelope, in clear. A host may forget who we
// are and say 401, having done nothing; then a new connection signs in anew,
// once.
func (c *core) exchange(ctx context.Context, envelope []byte) (answer []byte, status int, err error) {
	conn, err := c.borrow(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer func() { c.give(conn) }()
	// Basic sends the password with the request, so on a new connection a 401
	// is the answer to that, and the last word.
	last := conn == nil && !c.basic.Empty()
	for ; ; last = true {
		if conn == nil {
			if conn, err = c.connect(ctx); err != nil {
				return nil, 0, err
			}
		}
		got, err := c.send(ctx, conn, envelope)
		if err != nil {
			return nil, 0, err
		}
		if got.status != http.StatusUnauthorized {
			c.signedIn(nil)
			answer, err := c.open(conn, got)
			return answer, got.status, err
		}
		conn.close()
		conn = nil
		if last {
			refused := &SignInError{User: c.user, Wanted: "NTLM", Offers: offers(got.header)}
			if !c.basic.Empty() {
				refused.Wanted = "Basic"
			}
			c.signedIn(refused)
			return nil, got.status, refused
		}
	}
}

// connect makes a connection and signs it in.
func (c *core) connect(ctx context.Context) (*conn, error) {
	failed := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return &ConnectionError{Host: c.host, Err: err}
	}
	dialing, cancel := context.WithTimeout(ctx, 3*c.travel)
	defer cancel()
	conn, err := c.dial(dialing)
	if err != nil {
		if dialing.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("nothing within %v: %w", 3*c.travel, context.DeadlineExceeded)
		}
		return nil, failed(err)
	}
	if !c.basic.Empty() {
		return conn, nil
	}
	stop := conn.bound(ctx, c.timeout+c.travel)
	err = conn.signIn(c)
	stop()
	if err == nil {
		c.signedIn(nil)
		return conn, nil
	}
	conn.close()
	var refused *SignInError
	var answered *AnswerError
	if errors.As(err, &refused) {
		if refused.Err == nil {
			c.signedIn(refused)
		}
		return nil, err
	}
	if errors.As(err, &answered) {
		return nil, err
	}
	return nil, failed(err)
}

// send posts an envelope.
func (c *core) send(ctx context.Context, conn *conn, envelope []byte) (*httpAnswer, error) {
	contentType, body := soapType, envelope
	if conn.session != nil {
		contentType, body = sealedType, seal(conn.session, envelope)
	}
	stop := conn.bound(ctx, c.timeout+c.travel)
	got, sent, err := conn.post(c, contentType, string(c.basic.Reveal()), body, c.maxEnvelope+sealSlack)
	stop()
	switch {
	case err == nil:
		return got, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, errTooLarge):
		return nil, c.tooLarge()
	}
	return nil, &ConnectionError{Host: c.host, Sent: sent, Err: err}
}

func (c *core) tooLarge() error {
	return fmt.Errorf("%w: it has more than %d bytes", ErrEnvelope, c.maxEnvelope)
}

// open gives the envelope of an answer. On a connection that seals, one in
// clear is somebody else's, and a fault is no exception.
func (c *core) open(conn *conn, a *httpAnswer) ([]byte, error) {
	contentType := a.header.Get("Content-Type")
	body := a.body
	if conn.session != nil {
		if _, ok := isSealed(contentType); !ok {
			conn.close()
			return nil, fmt.Errorf("the answer is not sealed: %w", a.err())
		}
		var err error
		if body, err = unseal(conn.session, contentType, body); err != nil {
			conn.close()
			return nil, err
		}
	} else if kind, _, _ := mime.ParseMediaType(contentType); kind != "application/soap+xml" {
		return nil, a.err()
	}
	if len(body) > c.maxEnvelope {
		return nil, c.tooLarge()
	}
	return body, nil
}

// bound lets what follows on the connection take that long, and end with the
// context. The function it gives ends the bound.
func (c *conn) bound(ctx context.Context, d time.Duration) (stop func()) {
	c.nc.SetDeadline(time.Now().Add(d))
	end := context.AfterFunc(ctx, func() { c.nc.SetDeadline(time.Unix(1, 0)) })
	return func() {
		if !end() {
			c.broken = true // its deadline has passed, or is about to
		}
		c.nc.SetDeadline(time.Time{})
	}
}
