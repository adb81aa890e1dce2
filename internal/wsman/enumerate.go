package wsman

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// maxElements is how many instances one answer may hold. The envelope's limit
// comes first where they are large.
const maxElements = 1000

// maxEmpty is how often in a row a host may answer that it has nothing yet.
const maxEmpty = 20

// Enumerate gives all instances of a class and of those derived from it, as
// they come. It ends with the first error. A caller that stops early makes the
// host forget the rest.
func (c *Client) Enumerate(ctx context.Context, class string) iter.Seq2[*Instance, error] {
	return objects("enumerate "+class, c.enumerate(ctx, class, nil))
}

// Query gives what a query in WQL finds: SELECT, or ASSOCIATORS OF and
// REFERENCES OF, all of which Windows allows on a whole namespace alone.
// Properties that are references cannot be compared in it.
func (c *Client) Query(ctx context.Context, wql string) iter.Seq2[*Instance, error] {
	return objects(wql, c.enumerate(ctx, "*", func(w *writer) {
		w.raw(`<w:Filter Dialect="`, dialectWQL, `">`)
		w.esc(wql)
		w.raw("</w:Filter>")
	}))
}

// EnumerateRefs gives references to all instances of a class.
func (c *Client) EnumerateRefs(ctx context.Context, class string) iter.Seq2[Ref, error] {
	items := c.enumerate(ctx, class, func(w *writer) { w.raw("<w:EnumerationMode>EnumerateEPR</w:EnumerationMode>") })
	return func(yield func(Ref, error) bool) {
		for e, err := range items {
			var ref *Ref
			if err == nil {
				ref, err = readEndpoint(e)
			}
			if err == nil && ref == nil {
				err = fmt.Errorf("%w: %q is no reference", ErrProtocol, e.name)
			}
			if err != nil {
				yield(Ref{}, fmt.Errorf("enumerate references to %s: %w", class, err))
				return
			}
			if !yield(*ref, nil) {
				return
			}
		}
	}
}

// All collects what an iterator gives, up to its first error.
func All[T any](items iter.Seq2[T, error]) ([]T, error) {
	var all []T
	for v, err := range items {
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

func objects(what string, items iter.Seq2[*element, error]) iter.Seq2[*Instance, error] {
	return func(yield func(*Instance, error) bool) {
		for e, err := range items {
			var in *Instance
			if err == nil {
				in, err = decodeObject(e)
			}
			if err != nil {
				yield(nil, about(what, err))
				return
			}
			if !yield(in, nil) {
				return
			}
		}
	}
}

// about says of an error to which request it was the answer. Of the way to the
// host it is about none, and the request would only hide it.
func about(request string, err error) error {
	var cut *ConnectionError
	var who *SignInError
	if errors.As(err, &cut) || errors.As(err, &who) {
		return err
	}
	return fmt.Errorf("%s: %w", request, err)
}

// enumerate gives the items of an enumeration as elements.
func (c *Client) enumerate(ctx context.Context, class string, more func(*writer)) iter.Seq2[*element, error] {
	return func(yield func(*element, error) bool) {
		if class != "*" && !isName(class) {
			yield(nil, fmt.Errorf("%q is no class", class))
			return
		}
		uri := resource(c.namespace, class)
		page, err := c.page(ctx, request{action: actionEnumerate, resource: uri, repeat: true, body: func(w *writer) {
			w.raw("<n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>", fmt.Sprint(maxElements), "</w:MaxElements>")
			if more != nil {
				more(w)
			}
			w.raw("</n:Enumerate>")
		}})
		for empty := 0; ; {
			if err != nil {
				yield(nil, err)
				return
			}
			for _, item := range page.items {
				if !yield(item, nil) {
					c.release(ctx, uri, page)
					return
				}
			}
			if page.end {
				return
			}
			if empty++; len(page.items) > 0 {
				empty = 0
			}
			if empty > maxEmpty || page.context == "" {
				c.release(ctx, uri, page)
				yield(nil, fmt.Errorf("%w: the enumeration neither goes on nor ends", ErrProtocol))
				return
			}
			last := page
			// Not to be repeated: what a lost answer held would be missing.
			page, err = c.page(ctx, request{action: actionPull, resource: uri, body: func(w *writer) {
				w.raw("<n:Pull><n:EnumerationContext>")
				w.esc(last.context)
				w.raw("</n:EnumerationContext><n:MaxElements>", fmt.Sprint(maxElements), "</n:MaxElements></n:Pull>")
			}})
			var failed *ConnectionError
			if err != nil {
				err = fmt.Errorf("pull: %w", err)
				if !errors.As(err, &failed) {
					c.release(ctx, uri, last)
				}
			} else if page.context == "" {
				page.context = last.context
			}
		}
	}
}

// A page is one answer of an enumeration.
type page struct {
	items   []*element
	context string
	end     bool
}

func (c *Client) page(ctx context.Context, r request) (page, error) {
	e, err := c.do(ctx, r)
	if err != nil {
		return page{}, err
	}
	if e == nil || e.space != nsEnumeration || e.name != "EnumerateResponse" && e.name != "PullResponse" {
		return page{}, fmt.Errorf("%w: it is no part of an enumeration", ErrProtocol)
	}
	p := page{context: e.child(nsEnumeration, "EnumerationContext").trimmed(), end: e.named("EndOfSequence") != nil}
	// An Enumerate that is optimized has them in one namespace, a Pull in the
	// other.
	p.items = e.named("Items").all()
	return p, nil
}

// release tells the host to forget an enumeration. It would forget by itself,
// but each user may have only so many.
func (c *Client) release(ctx context.Context, uri string, p page) {
	if p.context == "" || p.end {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.travel)
	defer cancel()
	c.once(ctx, request{action: actionRelease, resource: uri, body: func(w *writer) {
		w.raw("<n:Release><n:EnumerationContext>")
		w.esc(p.context)
		w.raw("</n:EnumerationContext></n:Release>")
	}})
}
