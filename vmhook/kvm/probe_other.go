//go:build !amd64

package kvm

import "context"

var microGuests struct{}

func probe(context.Context, string, struct{}) Result {
	return unusable("the probe's guests are x86-64 code and this machine is not")
}
