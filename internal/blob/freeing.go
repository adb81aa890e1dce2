package blob

import "context"

type freeingKey struct{}

// Freeing marks what is stored under the context as small objects of somebody
// who frees room. A store that keeps some room back gives it to these and to
// nobody else, so that a full disk can be made less full.
func Freeing(ctx context.Context) context.Context {
	return context.WithValue(ctx, freeingKey{}, true)
}

// IsFreeing says whether Freeing marked the context.
func IsFreeing(ctx context.Context) bool {
	yes, _ := ctx.Value(freeingKey{}).(bool)
	return yes
}
