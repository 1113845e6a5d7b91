// Shows /openapi.json; asks no other origin (the validator badge is off).
window.SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
