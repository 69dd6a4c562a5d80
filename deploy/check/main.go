// Reads manifests strictly with the types of those who define them: a field that they don't have is an error. For kinds
// that Kubernetes itself doesn't have; its own are checked by their schemas (tests/test_deploy.py).
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	ray "github.com/ray-project/kuberay/ray-operator/apis/ray/v1"
	inference "sigs.k8s.io/gateway-api-inference-extension/api/v1"
	gateway "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"
)

func check(document []byte) (string, error) {
	var head struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	if err := yaml.Unmarshal(document, &head); err != nil {
		return "", err
	}
	kinds := map[string]any{
		"ray.io/v1 RayService":                         &ray.RayService{},
		"gateway.networking.k8s.io/v1 Gateway":         &gateway.Gateway{},
		"gateway.networking.k8s.io/v1 HTTPRoute":       &gateway.HTTPRoute{},
		"inference.networking.k8s.io/v1 InferencePool": &inference.InferencePool{},
	}
	kind := head.APIVersion + " " + head.Kind
	object, known := kinds[kind]
	if !known {
		return "", nil
	}
	if err := yaml.UnmarshalStrict(document, object); err != nil {
		return "", fmt.Errorf("%s: %w", kind, err)
	}
	return kind, nil
}

func main() {
	var failed error
	for _, path := range os.Args[1:] {
		text, err := os.ReadFile(path)
		failed = errors.Join(failed, err)
		for _, document := range bytes.Split(text, []byte("\n---\n")) {
			kind, err := check(document)
			if err != nil {
				failed = errors.Join(failed, fmt.Errorf("%s: %w", path, err))
			} else if kind != "" {
				fmt.Println(kind)
			}
		}
	}
	if failed != nil {
		fmt.Fprintln(os.Stderr, failed)
		os.Exit(1)
	}
}
